"""The control API of a rehearsal that runs, and the same calls over standard input for a test suite."""
