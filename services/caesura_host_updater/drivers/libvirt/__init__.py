"""The ``libvirt`` driver: domains as libvirt has them, paused and resumed by its daemon."""
