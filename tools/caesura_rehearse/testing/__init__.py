"""The pytest fixture ``caesura``: a rehearsal in a process of its own, seen from a test."""
