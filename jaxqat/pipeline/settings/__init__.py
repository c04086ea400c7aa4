"""The settings of an experiment's parts: dataclasses only, so that `--help` imports no JAX."""
