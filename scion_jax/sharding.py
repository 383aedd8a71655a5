"""Sharding in types: what to do when a mesh axis is `Explicit`.

On an Explicit mesh an array's type says how it is split, and contracting or merging a split axis
is an error unless the result's sharding is stated. The iteration needs whole matrices anyway, so
they are gathered first and split again afterwards. On an Auto mesh, or without one, the types say
nothing, and both functions return their argument.
"""

from __future__ import annotations

import jax
from jax.sharding import NamedSharding, PartitionSpec


def replicate(array: jax.Array) -> jax.Array:
    """Gathers an array whose type says that it is split over Explicit mesh axes."""
    sharding = jax.typeof(array).sharding
    if all(axis is None for axis in sharding.spec):
        return array
    whole = NamedSharding(sharding.mesh, PartitionSpec(*(None,) * array.ndim))
    return jax.sharding.reshard(array, whole)


def shard_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Splits `array` as the type of `like`, of the same shape, says."""
    sharding = jax.typeof(like).sharding
    if all(axis is None for axis in sharding.spec):
        return array
    return jax.sharding.reshard(array, sharding)
