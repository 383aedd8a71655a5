"""Bucketing: matrices of one shape, from however many leaves, become one stack.

The graph then grows with the number of distinct shapes instead of the number of layers, and a
device sees few large products instead of many small ones. The polar factor of `Xᵀ` is the transpose
of that of `X`, so wide and tall matrices share a bucket, in which all are wide.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from scion_jax.distributed import sharding
from scion_jax.polar import cpu


def map_buckets(
    function: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array]
) -> list[jax.Array]:
    """Applies a function to all matrices, once per distinct shape and dtype.

    Args:
        function: Maps `(batch, n, m)` with n ≤ m to the same shape, or to one number per matrix,
            `(batch,)`; each matrix on its own.
        stacks: Arrays `(batch, rows, columns)`, none empty.

    Returns:
        The results, in the order and shapes of `stacks`.
    """
    results = list(stacks)
    buckets: dict[Hashable, list[int]] = {}
    for index, stack in enumerate(stacks):
        n, m = sorted(stack.shape[1:])
        # In shard_map, what all devices share must not be joined with what differs.
        buckets.setdefault((n, m, stack.dtype, sharding.varying(stack)), []).append(index)
    for members in buckets.values():
        # Wide ones first, whatever leaves are called: what is fused depends on it.
        members.sort(key=lambda index: stacks[index].shape[1] > stacks[index].shape[2])
        wide = [_transposed_if_tall(stacks[index], stacks[index]) for index in members]
        result = function(joined(wide))
        for index, piece in zip(members, split(result, [w.shape[0] for w in wide]), strict=True):
            results[index] = _transposed_if_tall(piece, stacks[index])
    return results


def _transposed_if_tall(result: jax.Array, stack: jax.Array) -> jax.Array:
    """Transposes a result as its stack has to be; numbers stay as they are."""
    if result.ndim < 3 or stack.shape[1] <= stack.shape[2]:
        return result
    # All at once: without the layout TPUs would transpose the leaves, in float32.
    return with_layout_constraint(result, Layout((0, 1, 2))).mT


def joined(stacks: Sequence[jax.Array]) -> jax.Array:
    """Concatenates stacks of matrices of one shape."""
    return jnp.concatenate(stacks)


def split(stack: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Undoes `joined`, leaving out what may follow."""
    if list(sizes) == [stack.shape[0]]:
        return [stack]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    places = list(zip(starts, sizes, strict=True))
    return jax.lax.platform_dependent(
        stack,
        cpu=lambda stack: cpu.slices(stack, places),
        default=lambda stack: [
            jax.lax.slice_in_dim(stack, start, start + size) for start, size in places
        ],
    )


def in_chunks(
    function: Callable[[jax.Array], jax.Array], stack: jax.Array, chunk_bytes: int
) -> jax.Array:
    """Applies a function to a long stack piece by piece, which bounds its temporary memory.

    Args:
        function: Maps `(batch, n, m)` to `(batch, …)`, each matrix on its own.
        stack: Shape `(batch, n, m)`.
        chunk_bytes: Size of the matrices that go through at the same time, at least one matrix.

    Returns:
        The result for the whole stack.
    """
    batch, n, m = stack.shape
    rounds = -(-batch // max(1, chunk_bytes // (n * m * stack.dtype.itemsize)))
    if rounds == 1:
        return function(stack)
    size = -(-batch // rounds)
    rounds = -(-batch // size)
    chunks = jnp.pad(stack, ((0, rounds * size - batch), (0, 0), (0, 0)))
    result = jax.lax.map(function, chunks.reshape(rounds, size, n, m))
    return result.reshape(rounds * size, *result.shape[2:])[:batch]
