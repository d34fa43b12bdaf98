"""The host's kernel, and whether another one can be started under its guests (method kexec)."""
