"""Drivers: how a VM is frozen and resumed on this host."""
