"""The integer network in the formats that other runtimes read."""


class ExportError(ValueError):
    """A network, or a path, that cannot be exported as asked; the message names it and why."""
