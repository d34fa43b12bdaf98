"""The one fold of the bus: what each writer has said of the fleet, and what of it counts. Pure."""
