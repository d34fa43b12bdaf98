"""Recordings of a Scheduled Events server: made, read, and served again."""
