"""Starting points: every parameter on (or in) the ball that its optimizer keeps it in."""

from __future__ import annotations

from typing import Any

import jax
import jax.core

from scion_jax.distributed import sharding
from scion_jax.labels import Norms, norms_of
from scion_jax.norms import Auto, Norm


def init_params(
    key: jax.Array, params: Any, norms: Norms = Auto(), param_labels: Any = None
) -> Any:
    """Draws new parameters from the balls of their norms.

        x_l = radius_l · (a point of the unit ball of norm l)

    On the boundary for weights (semi-orthogonal matrices, random signs, normalized columns), zero
    for biases. `scion` keeps parameters inside their balls only if they start there.

    Args:
        key: PRNG key; every leaf gets its own.
        params: Parameters to replace, or their `jax.ShapeDtypeStruct`s.
        norms: One norm, or a mapping from labels to norms, as given to the optimizer.
        param_labels: Labels, as given to the optimizer.

    Returns:
        A tree like `params`, with the same shapes, dtypes and shardings.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If a leaf does not fit its norm's layout, or norms and labels do not belong
            together; the message names the leaf.

    Example:
        >>> import jax, jax.numpy as jnp, scion_jax
        >>> norm = scion_jax.Spectral(radius=4.0)
        >>> params = init_params(jax.random.key(0), {"kernel": jnp.zeros((16, 8))}, norm)
        >>> norm.gauge(params["kernel"]).round(3)
        Array(1., dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3 (initialization).
    """
    leaves, structure = jax.tree.flatten(params)
    leaf_norms: list[Norm] = jax.tree.leaves(norms_of(params, norms, param_labels))
    points = []
    for index, (leaf, norm) in enumerate(zip(leaves, leaf_norms, strict=True)):
        point = norm.init(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
        points.append(_place_like(point, leaf))
    return jax.tree.unflatten(structure, points)


def _place_like(array: jax.Array, like: Any) -> jax.Array:
    if isinstance(like, jax.core.Tracer):
        return sharding.shard_like(array, like)
    placement = getattr(like, "sharding", None)
    if placement is None or not getattr(like, "committed", True):
        return array
    return jax.device_put(array, placement)
