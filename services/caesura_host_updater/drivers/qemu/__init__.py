"""The ``qemu`` driver: real guests, handed from one QEMU process to the next without copying their memory."""
