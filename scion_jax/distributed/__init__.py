"""From leaves to stacks of matrices to devices, and back."""
