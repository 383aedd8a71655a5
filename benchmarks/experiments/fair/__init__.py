"""A fair comparison: everybody tuned with the same budget, once, at a small width."""
