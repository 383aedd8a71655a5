"""Starting points: every matrix on (or in) the ball that its optimizer keeps it in."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from scion_jax.distributed import sharding
from scion_jax.hyperparameters import check_flag, check_key
from scion_jax.labels import Initializer, ModelLabels, without_collection
from scion_jax.norms import Auto
from scion_jax.norms.leaves import Leaf
from scion_jax.resolution import Norms, resolve, warn_of_unused

# Vectors that start at zero in every framework. (A gain that did would kill its layer.)
_STARTS_AT_ZERO = re.compile(r"(^|_)(bias|beta)", re.IGNORECASE)


def init_params(
    key: jax.Array,
    params: Any,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    check: bool = False,
) -> Any:
    """Draws the matrices anew, each from the ball of its norm, and keeps the vectors.

        x_l = radius_l · (a point of the unit ball of norm l)

    On the boundary: semi-orthogonal matrices, random signs, normalized columns. `scion` keeps
    parameters inside their balls only if they start there. Biases and gains, whatever has no input
    axis, keep the values that the model gave them (usually 0 and 1), in copies. So does a matrix
    that the model starts at zero on purpose (LoRA's second factor), if the labels are those of
    `flax_norms`.

    Args:
        key: PRNG key; every leaf gets its own.
        params: The model's parameters. `jax.ShapeDtypeStruct`s suffice where it is known how the
            model starts its vectors: with labels of `flax_norms`, or for biases by their name.
        norms: One norm, or a mapping from labels to norms, as given to the optimizer.
        param_labels: Labels, as given to the optimizer.
        check: Whether to check that what was kept lies in its ball. Looks at values, so not under
            `jax.jit`.

    Returns:
        A tree like `params`, with the same shapes, dtypes and shardings, that shares no buffer
        with it.

    Raises:
        TypeError: If a leaf is not floating, or `key` is no key.
        ValueError: If a leaf does not fit its norm's layout, norms and labels do not belong
            together, the start of a vector is not known, or, with `check`, a kept leaf lies outside
            of its ball; the message names the leaves. With `check`, under `jax.jit`.

    Example:
        >>> import jax, jax.numpy as jnp, scion_jax
        >>> params = {"kernel": jnp.zeros((16, 8)), "scale": jnp.ones(8)}
        >>> params = init_params(jax.random.key(0), params, scion_jax.Auto(radius=4.0))
        >>> scion_jax.Spectral(radius=4.0).gauge(params["kernel"]).round(3), params["scale"][0]
        (Array(1., dtype=float32), Array(1., dtype=float32))

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3 (initialization).
    """
    check_key(key)
    check_flag("check", check)
    leaves = resolve(params, norms, param_labels)
    warn_of_unused(params, norms, param_labels)
    arrays, structure = jax.tree.flatten(params)
    points, unknown, outside = [], [], []
    for index, (leaf, array) in enumerate(zip(leaves, arrays, strict=True)):
        start = _start(leaf, array, param_labels)
        if start is None and leaf.layout.is_vector:
            unknown.append(leaf.path)
            continue
        leaf_key = jax.random.fold_in(key, index)
        point = (start or leaf.norm.init)(leaf_key, tuple(array.shape), array.dtype)
        points.append(_place_like(point, array))
        if check and start is not None and leaf.norm.constrained:
            gauge = leaf.norm.gauge(points[-1])
            if isinstance(gauge, jax.core.Tracer):
                raise ValueError("check=True looks at values; leave it out under jax.jit")
            if not gauge <= 1 + 1e-3:
                outside.append(f"'{leaf.path}' ({gauge:.3g} times its radius)")
    if unknown:
        raise ValueError(
            f"it is not known how the model starts {', '.join(map(repr, unknown))}: pass its "
            "parameters in place of shapes (a gain that starts at 0 kills its layer), or the "
            "labels of flax_norms"
        )
    if outside:
        raise ValueError(
            f"outside of their balls, where scion does not keep them: {', '.join(outside)}; give "
            "their norm a larger radius, or constrained=False"
        )
    return structure.unflatten(points)


def _start(leaf: Leaf, array: Any, param_labels: Any) -> Initializer | None:
    """Finds how a leaf starts that the norm does not draw; None for one that it does."""
    known = None
    if isinstance(param_labels, ModelLabels):
        known = param_labels.start_of(without_collection(leaf.path))
    if not leaf.layout.is_vector:
        return known
    if not isinstance(array, jax.ShapeDtypeStruct):
        return lambda *_: jnp.array(array, copy=True)
    if known is None and _STARTS_AT_ZERO.search(leaf.path.rsplit("/", 1)[-1]):
        return jax.nn.initializers.zeros
    return known


def _place_like(array: jax.Array, like: Any) -> jax.Array:
    if isinstance(like, jax.core.Tracer):
        return sharding.shard_like(array, like)
    placement = getattr(like, "sharding", None)
    if placement is None or not getattr(like, "committed", True):
        return array
    return jax.device_put(array, placement)
