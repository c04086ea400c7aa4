"""The commands of `jaxqat`, one module each; `jaxqat.cli` parses their arguments."""
