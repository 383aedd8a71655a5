"""Stochastic rounding: unbiased, repeatable, and nothing that was finite is lost."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scion_jax.transforms._rounding import _power_of_two, store

pytestmark = pytest.mark.fast

NARROW = [jnp.bfloat16, jnp.float16]
narrow = pytest.mark.parametrize("dtype", NARROW)


def store_often(x, dtype, times):
    """Stores at so many counts, `(times, *x.shape)`."""
    return jax.jit(jax.vmap(lambda count: store(x, dtype, count)))(jnp.arange(times))


def as_float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


@narrow
def test_what_a_dtype_has_is_kept(dtype):
    numbers = jax.lax.bitcast_convert_type(jnp.arange(2**16).astype(jnp.uint16), dtype)
    numbers = numbers[jnp.isfinite(numbers)].astype(jnp.float32)
    if dtype == jnp.bfloat16:
        numbers = jnp.where(jnp.abs(numbers) < 2.0**-119, 0, numbers)
    stored = store_often(numbers, dtype, 16)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(
        as_float64(stored), np.broadcast_to(np.float64(numbers), (16, numbers.size))
    )


@narrow
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 100.0])
def test_the_mean_is_what_was_stored(dtype, size):
    """Over many counts, and at one count over many numbers."""
    x = size * jax.random.uniform(jax.random.key(0), (1000,), minval=-1.0)
    errors = as_float64(store_often(x, dtype, 1000)) - np.float64(x)
    limits = jnp.finfo(dtype)
    place = np.maximum(2.0 ** np.floor(np.log2(np.abs(x))), float(limits.tiny)) * float(limits.eps)
    assert np.all(np.abs(errors) < place)  # one of the two neighbours
    shares = errors / place
    assert np.abs(shares.mean(0)).max() < 5 * 0.5 / np.sqrt(1000)
    assert np.abs(shares.mean(1)).max() < 5 * 0.5 / np.sqrt(1000)


@narrow
def test_finite_stays_finite_and_nothing_else_does(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.array([3.4e38, -3.4e38, largest, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    expected = [largest, -largest, largest, np.inf, -np.inf, np.nan]
    stored = store_often(x, dtype, 16)
    np.testing.assert_array_equal(as_float64(stored), np.broadcast_to(expected, (16, 6)))


@pytest.mark.parametrize(
    ("dtype", "expected"), [(jnp.bfloat16, "8a66f80df3527972"), (jnp.float16, "cf8b0c63a3357c1a")]
)
def test_roundings_never_change(dtype, expected):
    """A run that is resumed with another version of this library goes on as it would have."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(4096), jnp.float32)
    stored = store_often(x, dtype, 4)
    bits = np.asarray(jax.lax.bitcast_convert_type(stored, jnp.uint16))
    assert hashlib.sha256(bits.astype("<u2").tobytes()).hexdigest()[:16] == expected


def test_powers_of_two():
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    expected = 2.0 ** np.floor(np.log2(np.abs(x)))
    np.testing.assert_array_equal(_power_of_two(jnp.asarray(x)), expected)


def test_wider_dtypes_are_cast(x64):
    x = jnp.linspace(0, 1, 7, dtype=jnp.float64)
    for dtype in (jnp.float32, jnp.float64):
        np.testing.assert_array_equal(store(x, dtype, jnp.int32(0)), x.astype(dtype))
    assert store(x, jnp.bfloat16, jnp.int32(0)).dtype == jnp.bfloat16
