"""The pause guard: a process of its own that resumes VMs when the host updater cannot. Standard library only."""
