"""Grids, ranges, estimators, integer products and their straight-through gradients."""
