"""Polar factors of stacks of matrices: the iteration, its coefficients, and bounds."""
