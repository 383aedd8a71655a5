"""Activations scaled by √2, since half of a symmetric input is lost in a ReLU.

[S] Pethick et al., arXiv:2502.07529, App. E: with weights on the boundary of their balls, a layer
keeps the size of its input only if the activation does. For a symmetric input, `scaled_relu` keeps
the second moment exactly and `scaled_gelu` nearly; the mean of `scaled_relu_squared` is the input's
second moment.
"""

from __future__ import annotations

import math

import jax

from scion_jax._checks import FLOATING


def scaled_relu(x: jax.Array) -> jax.Array:
    """Computes `√2 · relu(x)`.

    Args:
        x: Any shape and floating dtype.

    Returns:
        Array of the same shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> scaled_relu(jnp.array([-1.0, 1.0])).round(2)
        Array([0.  , 1.41], dtype=float32)
    """
    _check(x)
    return math.sqrt(2) * jax.nn.relu(x)


def scaled_gelu(x: jax.Array, approximate: bool = True) -> jax.Array:
    """Computes `√2 · gelu(x)`.

    Args:
        x: Any shape and floating dtype.
        approximate: Use the tanh form, as `jax.nn.gelu` does.

    Returns:
        Array of the same shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> scaled_gelu(jnp.array([0.0, 10.0])).round(2)
        Array([ 0.  , 14.14], dtype=float32)
    """
    _check(x)
    return math.sqrt(2) * jax.nn.gelu(x, approximate=approximate)


def scaled_relu_squared(x: jax.Array) -> jax.Array:
    """Computes `(√2 · relu(x))² = 2 · relu(x)²`.

    Args:
        x: Any shape and floating dtype.

    Returns:
        Array of the same shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> scaled_relu_squared(jnp.array([-1.0, 3.0]))
        Array([ 0., 18.], dtype=float32)
    """
    _check(x)
    return 2 * jax.numpy.square(jax.nn.relu(x))


def _check(x: jax.Array) -> None:
    if str(getattr(x, "dtype", None)) not in FLOATING:
        raise TypeError(f"x is an array of a floating dtype; got {x!r}")
