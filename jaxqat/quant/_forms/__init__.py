"""The integer form of a value, and how operations carry it along."""
