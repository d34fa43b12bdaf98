"""What a rehearsal has observed, what was expected of it, and the report."""
