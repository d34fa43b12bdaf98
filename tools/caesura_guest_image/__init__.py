"""``caesura guest``: a small real guest (kernel and initramfs) for trying things out, the demo and the tests."""
