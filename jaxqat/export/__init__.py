"""The integer network in the formats that other runtimes read."""
