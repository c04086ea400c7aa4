"""The deployed network: integers from one product to the next, on every platform the same."""
