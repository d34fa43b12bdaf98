"""What crosses the bus: messages, topics, and how they become bytes."""
