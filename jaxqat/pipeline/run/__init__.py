"""The run folder: what lies where, what is saved, what the results say."""
