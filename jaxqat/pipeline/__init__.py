"""The experiment: from a configuration to a run folder."""
