"""``caesura demo``: a whole fleet on one machine, a real rollout over it, and a verdict."""
