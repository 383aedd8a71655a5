"""Batching: matrices of one shape, from however many leaves, become one stack.

The graph then grows with the number of distinct shapes instead of the number of layers, and a
device sees few large products instead of many small ones. What an iteration needs besides its
matrices is bounded: a long stack goes through in chunks, which are written back where they were
read, so that memory grows with depth by the stack itself and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scion_jax.polar.opaque import opaque
from scion_jax.polar.stack import Stack


def map_stacks(
    function: Callable[[Stack], Stack], batches: Sequence[jax.Array], chunk_bytes: int
) -> list[jax.Array]:
    """Applies a function to all matrices, once per distinct shape.

    Args:
        function: Maps a stack to one of the same shapes, each matrix on its own.
        batches: Arrays `(batch, p, q)`; those whose `{p, q}` and dtype agree form a stack.
        chunk_bytes: Size of the matrices that go through at the same time, at least one matrix.

    Returns:
        The results, in the order and shapes of `batches`.
    """
    results: list[jax.Array] = list(batches)
    for wide, tall in _groups(batches):
        stack = Stack(*(_stacked([batches[i] for i in part]) for part in (wide, tall)))
        result = _in_chunks(function, stack, chunk_bytes)
        for part, members in zip(result, (wide, tall), strict=True):
            if part is not None:
                pieces = _unstacked(part, [batches[i].shape[0] for i in members])
                for index, piece in zip(members, pieces, strict=True):
                    results[index] = piece
    return results


def measure_stacks(
    function: Callable[[Stack], jax.Array], batches: Sequence[jax.Array]
) -> list[jax.Array]:
    """Computes one number per matrix, with one call per distinct shape.

    Args:
        function: Maps a stack to the numbers of its lying and then its standing matrices.
        batches: Arrays `(batch, p, q)`, as in `map_stacks`.

    Returns:
        The numbers of each array, `(batch,)`, in the order of `batches`.
    """
    results: list[jax.Array] = list(batches)
    for wide, tall in _groups(batches):
        stack = Stack(*(_stacked([batches[i] for i in part]) for part in (wide, tall)))
        members = [*wide, *tall]
        pieces = _unstacked(function(stack), [batches[i].shape[0] for i in members])
        for index, piece in zip(members, pieces, strict=True):
            results[index] = piece
    return results


def _groups(batches: Sequence[jax.Array]) -> list[tuple[list[int], list[int]]]:
    """Finds the positions of the lying and the standing matrices of each shape and dtype."""
    groups: dict[Any, tuple[list[int], list[int]]] = {}
    for index, batch in enumerate(batches):
        first, second = batch.shape[1:]
        key = (min(first, second), max(first, second), batch.dtype)
        groups.setdefault(key, ([], []))[first > second].append(index)
    return list(groups.values())


def _stacked(batches: Sequence[jax.Array]) -> jax.Array | None:
    if len(batches) < 2:
        return batches[0] if batches else None
    return jnp.concatenate(batches)


def _unstacked(stack: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Cuts a stack into pieces."""
    if len(sizes) == 1:
        return [stack]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    # The compiler makes one kernel for all pieces of one size if it does not know where they lie,
    # and one for each (8 ms on a CPU) if it does. Unsigned, so that no index is checked for sign.
    hidden = opaque([jnp.uint32(start) for start in starts])
    return [
        jax.lax.dynamic_slice_in_dim(stack, start, size)
        for start, size in zip(hidden, sizes, strict=True)
    ]


def _in_chunks(function: Callable[[Stack], Stack], stack: Stack, chunk_bytes: int) -> Stack:
    matrix_bytes = stack.small * stack.large * stack.dtype.itemsize
    rounds = _rounds(stack.sizes, max(1, chunk_bytes // max(1, matrix_bytes)))
    if rounds == 1:
        return function(stack)
    whole = stack.map(lambda part: _padded(part, rounds))

    def chunk(index: jax.Array, whole: Stack) -> Stack:
        def read(part: jax.Array) -> jax.Array:
            size = part.shape[0] // rounds
            return jax.lax.dynamic_slice_in_dim(part, index * size, size)

        def write(part: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(part, new, index * new.shape[0], 0)

        return whole.map(write, function(whole.map(read)))

    done = jax.lax.fori_loop(0, rounds, chunk, whole)
    return done.map(lambda part, old: part[: old.shape[0]], stack)


def _rounds(counts: Sequence[int], fitting: int) -> int:
    """Finds a number of equal chunks that needs little padding.

    Both kinds of matrices are in every chunk, so 24 lying and 12 standing ones want 12 chunks of 3,
    even if 2 would fit: chunks of up to three times `fitting` are allowed for that.
    """
    fewest, most = (-(-sum(counts) // size) for size in (3 * fitting, fitting))

    def cost(rounds: int) -> tuple[int, int]:
        return sum(-(-count // rounds) * rounds for count in counts), -rounds

    return min(range(fewest, min(most, max(counts)) + 1), key=cost) if most > 1 else 1


def _padded(part: jax.Array, rounds: int) -> jax.Array:
    missing = -part.shape[0] % rounds
    return jnp.pad(part, ((0, missing), (0, 0), (0, 0))) if missing else part
