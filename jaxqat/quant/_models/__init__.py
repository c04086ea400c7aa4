"""Linen, NNX, Equinox and functions behind one interface."""
