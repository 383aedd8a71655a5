"""Stacks: matrices of one shape go through an iteration together.

The graph then grows with the number of distinct shapes instead of the number of layers, and a
device sees few large products instead of many small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def map_stacks(
    function: Callable[[jax.Array], jax.Array], batches: Sequence[jax.Array]
) -> list[jax.Array]:
    """Applies `function` once per distinct matrix shape.

    Args:
        function: Maps a stack `(batch, rows, columns)` with `rows ≤ columns`, each matrix on its
            own, to a stack of the same shape (and then commutes with transposition) or to one
            number per matrix, `(batch,)`.
        batches: Arrays `(batch, m, n)`; those whose `{m, n}` and dtype agree are stacked,
            whichever way round they stand.

    Returns:
        The results, in the order of `batches` and standing as they do.
    """
    groups: dict[tuple[int, int, jnp.dtype], list[int]] = {}
    for index, batch in enumerate(batches):
        rows, columns = sorted(batch.shape[1:])
        groups.setdefault((rows, columns, batch.dtype), []).append(index)
    results: list[jax.Array] = list(batches)
    for members in groups.values():
        result = function(jnp.concatenate([_wide(batches[index]) for index in members]))
        start = 0
        for index in members:
            batch = batches[index]
            part = jax.lax.slice_in_dim(result, start, start + batch.shape[0])
            results[index] = part if part.ndim == 1 or _is_wide(batch) else part.mT
            start += batch.shape[0]
    return results


def _is_wide(batch: jax.Array) -> bool:
    return batch.shape[1] <= batch.shape[2]


def _wide(batch: jax.Array) -> jax.Array:
    return batch if _is_wide(batch) else batch.mT
