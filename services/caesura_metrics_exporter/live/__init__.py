"""The live page: what is drawn, and how it reaches browsers."""
