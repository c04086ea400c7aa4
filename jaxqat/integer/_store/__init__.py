"""Saving an integer graph as a folder, and loading it."""
