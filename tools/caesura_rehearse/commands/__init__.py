"""The command line of ``caesura rehearse``: its options, and one run from set-up to report."""
