"""The live page: its content, and how it reaches browsers."""
