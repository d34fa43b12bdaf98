"""Pure machines that several services agree on."""
