"""The commands of the `jaxqat` command line, one module each; `jaxqat.cli` parses for them."""
