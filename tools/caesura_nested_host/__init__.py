"""A host in emulation whose kernel can be replaced under its guests: its image, its QEMU, what runs on it, what its guests say.

For the demo, the tests of method kexec and the benchmark; without KVM, and without root once the image is there.
"""
