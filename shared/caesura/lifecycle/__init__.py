"""Pure state machines shared by several services."""
