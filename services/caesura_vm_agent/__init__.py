"""The VM agent: in the guest, it runs hooks around a freeze, reports whether it is ready, and keeps the clock right."""
