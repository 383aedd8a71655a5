"""Starting points: every matrix on (or in) the ball that its optimizer keeps it in."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax import _sharding as sharding
from scion_jax._checks import warn
from scion_jax._leaves import Norms, read_leaves, unused
from scion_jax._paths import kind_of_vector
from scion_jax.norms import Auto, Leaf, Norm


def init_params(
    key: jax.Array, params: Any, norms: Norms = Auto(), param_labels: Any = None
) -> Any:
    """Draws the matrices anew, each from the ball of its norm, and keeps the vectors.

        x_l = radius_l · (a point of the unit ball of norm l)

    On the boundary: semi-orthogonal matrices, random signs, normalized columns. `scion` keeps
    parameters inside their balls only if they start there. Biases and gains, whatever has no input
    axis, keep the values that the model gave them (usually 0 and 1), in copies. So does a matrix
    that is given as zeros, which the model starts there on purpose: LoRA's second factor, a head.

    Args:
        key: PRNG key; every leaf gets its own.
        params: The model's parameters. `jax.ShapeDtypeStruct`s suffice where there are no gains:
            matrices are drawn then, and what is called `bias`, `beta`, `offset` or `b` is 0.
        norms: One norm, a mapping from labels to norms, or an `Assignment`, as given to the
            optimizer.
        param_labels: Labels, as given to the optimizer.

    Returns:
        A tree like `params`, with the same shapes, dtypes and shardings, that shares no buffer
        with it.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If a leaf does not fit its norm's layout, norms and labels do not belong
            together, or the start of a vector is not known; the message names the leaves.

    Example:
        >>> import jax, jax.numpy as jnp, scion_jax
        >>> params = {"kernel": jnp.ones((16, 8)), "scale": jnp.ones(8)}
        >>> params = init_params(jax.random.key(0), params, scion_jax.Auto(radius=4.0))
        >>> scion_jax.Spectral(radius=4.0).gauge(params["kernel"]).round(3), params["scale"][0]
        (Array(1., dtype=float32), Array(1., dtype=float32))

    Source: [S] Pethick et al., arXiv:2502.07529, Sec. 3 (initialization).
    """
    leaves = read_leaves(params, norms, param_labels)
    for sentence in unused(params, norms, param_labels):
        warn(sentence)
    arrays, structure = jax.tree.flatten(params)
    unknown = [
        repr(leaf.path)
        for leaf, array in zip(leaves, arrays, strict=True)
        if leaf.layout.is_vector and _is_shape(array) and kind_of_vector(leaf.path) != "shift"
    ]
    if unknown:
        raise ValueError(
            f"it is not known how the model starts {', '.join(unknown)}: pass its parameters in "
            "place of shapes (a gain that starts at 0 kills its layer)"
        )
    starts = [
        _start(key, index, leaf, array)
        for index, (leaf, array) in enumerate(zip(leaves, arrays, strict=True))
    ]
    return structure.unflatten(starts)


def _is_shape(array: Any) -> bool:
    return isinstance(array, jax.ShapeDtypeStruct)


def _start(key: jax.Array, index: int, leaf: Leaf, array: Any) -> jax.Array:
    shape = tuple(array.shape)
    if leaf.layout.is_vector:
        kept = jnp.zeros(shape, array.dtype) if _is_shape(array) else jnp.array(array, copy=True)
        return sharding.place_like(kept, array)
    try:
        hash(leaf.norm)
    except TypeError:  # a radius that is an array, or traced
        drawn = _draw(key, index, leaf.norm, shape, array.dtype)
    else:
        drawn = _compiled_draw(key, index, leaf.norm, shape, array.dtype)
    drawn = sharding.place_like(drawn, array)
    return drawn if _is_shape(array) else _unless_zero(drawn, array)


def _draw(
    key: jax.Array, index: int, norm: Norm, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    return norm.init(jax.random.fold_in(key, index), shape, dtype)


# Once for each norm and shape; an operation at a time takes a small model seconds to compile.
_compiled_draw = functools.partial(jax.jit, static_argnames=("norm", "shape", "dtype"))(_draw)


@jax.jit
def _unless_zero(drawn: jax.Array, given: jax.Array) -> jax.Array:
    return jnp.where(jnp.any(given != 0), drawn, given)  # also tells how the result is split
