"""What an average of gradients loses when it is stored in 16 bits, and how not to lose it.

A step of an average adds `α (g − d)` to `d`. Rounded to the nearest bfloat16, what is below half of
the last place of `d` is lost, at every step anew: the average stands still once it is within
`2⁻⁹/α` of the gradient, relatively (20 % at α = 0.01), and below α = 2⁻⁹ it forgets nothing any
more. Rounded up or down at random, the more often the nearer, it errs by as much in one step and by
nothing in the mean of many.

The random number is a hash of the number to be stored and of how many were stored before: no key in
the state, nothing that depends on how an array is split, and a run that is resumed rounds as it
would have. The last bits, which another compiler may compute otherwise, are left out of the hash.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax._checks import only_where
from scion_jax._numerics import widest
from scion_jax._paths import leaf_path


def store(array: jax.Array, dtype: DTypeLike, count: jax.Array) -> jax.Array:
    """Casts to the dtype of a buffer; to 16 bits by stochastic rounding.

    What a 16-bit dtype has stays as it is (but for bfloat16's below 1e-36). What is finite stays
    finite, at most the dtype's largest number; NaN and infinity stay what they are.

    Args:
        array: What to store, of at least float32.
        dtype: Dtype of the buffer.
        count: Something that differs from one update to the next, int32.

    Returns:
        Array of the same shape and that dtype.
    """
    limits = jnp.finfo(dtype)
    if limits.bits > 16:
        return array.astype(dtype)
    x = array.astype(jnp.float32)
    # Numbers that are not normal have a fixed last place; bfloat16's is beyond float32's range.
    smallest = max(float(limits.tiny) * float(limits.eps), float(jnp.finfo(jnp.float32).tiny))
    spacing = jnp.maximum(_power_of_two(x) * float(limits.eps), smallest)
    lower = spacing * jnp.floor(x / spacing)
    rounded = jnp.where(x - lower > spacing * _hash(x, count), lower + spacing, lower)
    inside = jnp.clip(rounded, float(limits.min), float(limits.max))
    return jnp.where(jnp.isfinite(x), inside, x).astype(dtype)


def buffer_dtypes(buffers: Any, dtype: DTypeLike | None, params: Any) -> Any:
    """Finds the dtype in which each buffer is to be stored.

    A state that was restored, or saved by an optimizer that was built otherwise, may hold another
    dtype than was promised: it is converted where that loses nothing.

    Args:
        buffers: The buffers.
        dtype: What the optimizer was built with; None means the parameters'.
        params: The parameters; None leaves the buffers' own where `dtype` is None.

    Returns:
        A tree of dtypes.

    Raises:
        TypeError: If a conversion would lose something; the message names both dtypes.
    """

    def chosen(keys: Any, buffer: jax.Array, like: jax.Array) -> jnp.dtype:
        promised = jnp.dtype(jax.dtypes.canonicalize_dtype(like.dtype if dtype is None else dtype))
        if widest(buffer.dtype, promised) != promised:
            raise TypeError(
                f"the state holds {buffer.dtype} for leaf '{leaf_path(keys)}', but the optimizer "
                f"was built for {promised}, which would lose something of it; give momentum_dtype="
                f"jnp.{buffer.dtype}, or convert the state"
            )
        return promised

    # A model as parameters may hold functions where it has no gradients.
    like = buffers if params is None or dtype is not None else only_where(buffers, params)
    return jax.tree_util.tree_map_with_path(chosen, buffers, like)


def _power_of_two(x: jax.Array) -> jax.Array:
    """Finds the largest power of two that is at most `|x|`: the exponent alone, of float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0x7F800000), jnp.float32)


def _hash(x: jax.Array, count: jax.Array) -> jax.Array:
    """Makes numbers in [0, 1) of `x` without its last 8 bits and a count, as MurmurHash3 ends."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 8
    bits ^= count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits ^= bits >> 16
    return (bits >> 8).astype(jnp.float32) * 2.0**-24
