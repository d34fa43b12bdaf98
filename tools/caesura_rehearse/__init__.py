"""``caesura rehearse``: any program gets a real Freeze, on a laptop or in CI. A plug-in of the command."""
