"""The commands of `jaxqat`, one file each."""
