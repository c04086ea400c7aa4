"""The experiment: from a config to a run folder."""
