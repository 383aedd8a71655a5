"""Scale-free arithmetic: norms and normalizations without an additive epsilon.

An epsilon breaks the one property that every LMO has, `lmo(a·d) = lmo(d)` for `a > 0`. Here squares
stay in range from 1e-38 to 1e38, zero stays zero because nothing is divided by zero, and NaN and
infinity come out as NaN instead of a plausible number. Everything can be differentiated, with the
derivative 0 at zero.
"""

from __future__ import annotations

import numbers
from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Tree = TypeVar("Tree")


def widest(*dtypes: DTypeLike) -> jnp.dtype:
    """Finds the dtype that holds all of the given ones (float32 for float16 and bfloat16).

    An explicit question, so it is answered under strict dtype promotion too. NumPy's float64 counts
    as what JAX makes of it, float32 by default.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*map(jax.dtypes.canonicalize_dtype, dtypes))


def at_least_float32(array: jax.Array) -> jax.Array:
    """Casts float16 and bfloat16 to float32; leaves float32 and float64 alone."""
    return jnp.asarray(array, widest(array.dtype, jnp.float32))


def is_number(value: object) -> TypeGuard[float]:
    """Tells a plain number, which can be checked, from an array or a traced value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def inner_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `⟨x, y⟩` over all entries, in at least float32."""
    dtype = widest(x.dtype, y.dtype, jnp.float32)
    return jnp.sum(x.astype(dtype) * y.astype(dtype))


def nonzero(divisor: jax.Array) -> jax.Array:
    """Replaces exact zeros by one, so that dividing a zero by its own size gives zero."""
    return jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)


def power(x: jax.Array, exponent: float) -> jax.Array:
    """Computes `x ** exponent` for `x ≥ 0`; at zero it is 0, and so is its derivative."""
    safe = nonzero(x)
    root = jnp.sqrt(safe) if exponent == 0.5 else safe**exponent
    return jnp.where(x == 0, jnp.zeros_like(x), root)


def largest_or_nan(array: jax.Array) -> jax.Array:
    """Finds the largest entry, or NaN if one is NaN.

    XLA for CPUs forgets NaN in a maximum over 4,096 entries or more (since JAX 0.10 at the latest).
    """
    return jax.lax.platform_dependent(
        array,
        cpu=lambda array: jnp.max(array) + jnp.sum(jnp.where(jnp.isnan(array), array, 0)),
        default=jnp.max,
    )


def hidden(tree: Tree) -> Tree:
    """Returns the same arrays, about which the compiler knows nothing but shape and dtype.

    An optimization barrier says so, but XLA for CPUs drops it before it is done simplifying (in
    JAX 0.10). A loop of two rounds that returns the value is beyond all versions of it.
    """
    return jax.lax.fori_loop(0, 2, lambda _, __: tree, jax.tree.map(jnp.zeros_like, tree))


def vector_norm(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes `‖·‖₂` over `axes`, kept as axes of size 1, without overflow or underflow."""
    scaled, unit = _scaled(array, axes)
    return unit * _length(scaled, axes)


def normalize(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes `array / ‖array‖₂` over `axes`; zero where the norm is zero."""
    scaled, _ = _scaled(array, axes)
    length = _length(scaled, axes)
    return jnp.where(length == 0, jnp.zeros_like(scaled), scaled / nonzero(length))


def _scaled(array: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Divides by the largest entry, so that squares stay in range; it is a constant to `grad`."""
    largest = jnp.max(jnp.abs(array), axis=axes, keepdims=True, initial=0)
    unit = jax.lax.stop_gradient(nonzero(largest))
    return array / unit, unit


def _length(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return power(jnp.sum(array * array, axis=axes, keepdims=True), 0.5)
