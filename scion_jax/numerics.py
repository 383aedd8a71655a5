"""Scale-free arithmetic: norms and normalizations without an additive epsilon.

An epsilon breaks the one property that every LMO has, `lmo(a·d) = lmo(d)` for `a > 0`. Here squares
stay in range from 1e-38 to 1e38, zero stays zero because nothing is divided by zero, and NaN and
infinity come out as NaN instead of a plausible number.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax.distributed import sharding


def widest(*dtypes: DTypeLike) -> jnp.dtype:
    """Finds the dtype that holds all of the given ones (float32 for float16 and bfloat16).

    An explicit question, so it is answered under strict dtype promotion too. NumPy's float64 counts
    as what JAX makes of it, float32 by default.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*map(jax.dtypes.canonicalize_dtype, dtypes))


SUPPORTED = ("float16", "bfloat16", "float32", "float64")


def check_floating(leaf: Any, name: str) -> None:
    """Checks that something is an array, or the shape of one, that can be optimized.

    Args:
        leaf: An array, or anything with its `shape` and `dtype`.
        name: What to call it in error messages, such as `"leaf 'head/kernel'"`.

    Raises:
        TypeError: If it is no array, or of another dtype than float16, bfloat16, float32 and
            float64.
    """
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"{name} is {leaf!r}, which is no array; make it one (jnp.asarray), or leave it out "
            "(optax.masked, nnx.Optimizer(wrt=…), eqx.filter)"
        )
    if str(leaf.dtype) not in SUPPORTED:
        raise TypeError(
            f"{name} of shape {tuple(leaf.shape)} has dtype {leaf.dtype}; parameters and gradients "
            f"are of a floating dtype, {', '.join(SUPPORTED)}; leave others out (optax.masked, "
            "nnx.Optimizer(wrt=…), eqx.filter)"
        )


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


def largest_or_nan(array: jax.Array) -> jax.Array:
    """Finds the largest entry, or NaN if one is NaN.

    XLA for CPUs forgets NaN in a maximum over 4,096 entries or more (since JAX 0.10 at the latest).
    """
    return jax.lax.platform_dependent(
        array,
        cpu=lambda array: jnp.where(jnp.any(jnp.isnan(array)), jnp.nan, jnp.max(array)),
        default=jnp.max,
    )


def vector_norm(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes `‖·‖₂` over `axes`, kept as axes of size 1, without overflow or underflow."""
    root, unit = _root_and_unit(array, axes)
    return unit * root


def vector_norms(arrays: Sequence[jax.Array]) -> jax.Array:
    """Computes `‖·‖₂` of every whole array, `(len(arrays),)`: past the sums, all at once.

    One array at a time, the scalar arithmetic would be a dozen kernels for each on a GPU.
    """
    if any(map(sharding.may_be_split, arrays)):
        sums = zip(*(_sums_by_size(array, None) for array in arrays), strict=True)
        root, unit = _joined(*map(jnp.stack, sums))
    else:
        unit = nonzero(jnp.stack([jnp.max(jnp.abs(array), initial=0) for array in arrays]))
        scaled = [array / largest for array, largest in zip(arrays, unit, strict=True)]
        root = jnp.sqrt(jnp.stack([jnp.sum(entries * entries) for entries in scaled]))
    return unit * root


def normalize(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes `array / ‖array‖₂` over `axes`; zero where the norm is zero."""
    root, unit = _root_and_unit(array, axes)
    return array / unit / nonzero(root)


def _root_and_unit(array: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Computes `‖array‖₂` in a unit that keeps its square in range, and the unit."""
    if sharding.may_be_split(array):
        return _in_one_pass(array, axes)
    largest = nonzero(jnp.max(jnp.abs(array), axis=axes, keepdims=True, initial=0))
    scaled = array / largest
    return jnp.sqrt(jnp.sum(scaled * scaled, axis=axes, keepdims=True)), largest


def _in_one_pass(array: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The same with one reduction over devices instead of two, for an array that is split.

    Squares of large, of middling and of small entries are summed apart, each scaled by a power of
    two (Blue, 1978, doi:10.1145/355769.355771). It needs more memory, so not for all.
    """
    return _joined(*_sums_by_size(array, axes))


def _middling_and_power(dtype: jnp.dtype) -> tuple[float, float]:
    return (2.0**50, 2.0**80) if dtype == jnp.float32 else (2.0**400, 2.0**640)


def _sums_by_size(
    array: jax.Array, axes: tuple[int, ...] | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums squares of large (divided by `power`), middling and small (times `power`) entries."""
    middling, power = _middling_and_power(array.dtype)
    size = jnp.abs(array)
    is_large, is_small = size > middling, size < 1 / middling

    def sum_of_squares(entries: jax.Array) -> jax.Array:
        return jnp.sum(entries * entries, axis=axes, keepdims=axes is not None)

    return (
        sum_of_squares(jnp.where(is_large, array * (1 / power), 0)),
        sum_of_squares(jnp.where(is_large | is_small, 0, array)),  # NaN too
        sum_of_squares(jnp.where(is_small, array * power, 0)),
    )


def _joined(large: jax.Array, middle: jax.Array, small: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes the root of the three sums together, in a unit that keeps its square in range."""
    _, power = _middling_and_power(large.dtype)
    # What the next smaller ones add. Not by the square of a scaled root: compilers make a product
    # of the two scales of it, which underflows.
    large_and_middle = jnp.hypot(jnp.sqrt(large), jnp.sqrt(middle) * (1 / power))
    middle_and_small = jnp.hypot(jnp.sqrt(middle), jnp.sqrt(small) * (1 / power))
    root = jnp.where(middle == 0, jnp.sqrt(small), middle_and_small)
    unit = jnp.where(middle == 0, jnp.full_like(large, 1 / power), 1)
    root = jnp.where(large > 0, large_and_middle, root)
    unit = jnp.where(large > 0, power, unit)
    return root + (root - root), unit  # NaN for infinity, so that it is not hidden
