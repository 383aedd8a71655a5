"""What tests share: one table of norms and one of optimizers, oracles, meshes, random input."""
