"""The commands of ``caesura`` that talk to a fleet."""
