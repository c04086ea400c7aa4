"""The traced program: one flat list of operations, and its arguments."""
