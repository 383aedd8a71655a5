"""Leaves: parameters whose norm and axes are known, and their LMOs taken together.

The one room where parameters of all norms meet. Matrices of one shape go through the iteration as
one stack whatever their norm, layout or radius, so that graph, compile time and communication do
not grow with their variety; every other norm takes its leaves one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

from scion_jax import numerics
from scion_jax.distributed import sharding
from scion_jax.distributed.spreading import polar_factors, spectral_norm_bounds
from scion_jax.norms.axes import Axes
from scion_jax.norms.base import Norm
from scion_jax.norms.layout import Layout
from scion_jax.norms.spectral import Spectral
from scion_jax.polar.orthogonalizers import Orthogonalizer


class Leaf(NamedTuple):
    """One parameter, resolved.

    Attributes:
        path: Where it stands in its tree, such as `"head/kernel"`.
        norm: Its norm, never `Auto`.
        layout: Its blocks and their axes.
    """

    path: str
    norm: Norm
    layout: Layout


def lmos(
    leaves: Sequence[Leaf],
    ds: Sequence[jax.Array],
    shard_over: tuple[str, ...] | None = None,
) -> list[jax.Array]:
    """Computes the LMO of every leaf; see `Norm.lmo`.

    Args:
        leaves: The leaves.
        ds: Their directions, any floating dtypes.
        shard_over: Over which devices stacks are spread; see `scion_jax.distributed.spreading`.

    Returns:
        The maximizers, in the same order, shapes, dtypes and shardings.
    """
    blocks = [leaf.layout.split(d) for leaf, d in zip(leaves, ds, strict=True)]
    spectral: dict[Orthogonalizer, list[_Block]] = {}
    for index, (_, norm, layout) in enumerate(leaves):
        for position, axes in enumerate(layout.blocks):
            if isinstance(norm, Spectral):
                place = _Block(index, position, norm, axes)
                spectral.setdefault(norm.orthogonalizer, []).append(place)
            else:
                wide = numerics.at_least_float32(blocks[index][position])
                blocks[index][position] = norm.unit_lmo(wide, axes)
    for orthogonalizer, places in spectral.items():
        matrices = [axes.to_matrices(blocks[i][p]) for i, p, _, axes in places]
        polars = polar_factors(matrices, orthogonalizer, shard_over)
        for (i, p, norm, axes), polar in zip(places, polars, strict=True):
            blocks[i][p] = norm.from_polar(polar, axes)
    return [
        sharding.shard_like(norm.scaled(layout.join(units)).astype(d.dtype), d)
        for (_, norm, layout), units, d in zip(leaves, blocks, ds, strict=True)
    ]


def gauge_bounds(
    leaves: Sequence[Leaf],
    xs: Sequence[jax.Array],
    shard_over: tuple[str, ...] | None = None,
) -> list[jax.Array]:
    """Bounds the gauge of every leaf from above, without a decomposition.

    Args:
        leaves: The leaves.
        xs: Parameters or directions, any floating dtypes.
        shard_over: Over which devices stacks are spread; see `scion_jax.distributed.spreading`.

    Returns:
        Scalars, in the same order: the gauge, for `Spectral` up to 3 % more at 2,048 rows (see
        `scion_jax.polar.spectral_bound`).
    """
    blocks = [leaf.layout.split(x) for leaf, x in zip(leaves, xs, strict=True)]
    places: list[_Block] = []
    for index, (_, norm, layout) in enumerate(leaves):
        for position, axes in enumerate(layout.blocks):
            if isinstance(norm, Spectral):
                places.append(_Block(index, position, norm, axes))
            else:
                wide = numerics.at_least_float32(blocks[index][position])
                blocks[index][position] = norm.unit_gauge(wide, axes)
    matrices = [axes.to_matrices(blocks[i][p]) for i, p, _, axes in places]
    bounds = spectral_norm_bounds(matrices, shard_over)
    for (i, p, norm, axes), bound in zip(places, bounds, strict=True):
        blocks[i][p] = bound / norm.unit_radius(axes)
    return [
        leaf.norm.largest(sizes, leaf.layout) for leaf, sizes in zip(leaves, blocks, strict=True)
    ]


class _Block(NamedTuple):
    leaf: int
    position: int
    norm: Spectral
    axes: Axes
