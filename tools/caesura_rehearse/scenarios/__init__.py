"""Scenarios: what happens to which VM and when; the files of those that are shipped lie here, too."""
