"""One operation of a host: pure state and decisions, the runner that carries them out, recovery after a crash, the report."""
