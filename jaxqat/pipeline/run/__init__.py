"""The run folder: its files, the saved states and the results."""
