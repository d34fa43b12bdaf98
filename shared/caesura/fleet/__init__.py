"""The one fold of the bus: what each writer has published about the fleet, and which of it counts. Pure."""
