"""Tests run on the CPU, whatever else the machine has, and never touch a user's cache."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
