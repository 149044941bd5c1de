"""Weights on disk, and where they come from. Importing the room imports no torch; its files do."""
