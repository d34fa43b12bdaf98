"""The ``process`` driver: supervised process groups, frozen by the kernel. The embedded default."""
