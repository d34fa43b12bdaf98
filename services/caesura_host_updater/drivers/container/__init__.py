"""The ``container`` driver: Docker and Podman containers, paused and resumed through their engine."""
