"""The metadata publisher: the Azure-compatible HTTP API of scheduled events, approvals and instance metadata."""
