"""``caesura guest``: a small real guest (kernel and initramfs) for experiments, the demo and the tests."""
