"""Control of VM processes from outside: procfs, cgroups, claims, QMP, plans that undo a pause. Standard library only."""
