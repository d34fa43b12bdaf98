"""``caesura conformance``: how far any server of the metadata API is what clients of the real one expect."""
