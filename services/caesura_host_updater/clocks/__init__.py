"""Whether the clock of a VM is right after a pause."""
