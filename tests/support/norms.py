"""Every norm with every option, and arrays in every kind of layout.

To add a norm, add a row to `NORMS`, and its ball to `naive.BALLS`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scion_jax
from scion_jax import ExactPolar, NewtonSchulz

# id: (class, options)
NORMS = {
    "Spectral": ("Spectral", {}),
    "Spectral, not normalized": ("Spectral", {"normalized": False}),
    "Spectral, max": ("Spectral", {"max": True}),
    "Spectral, rms": ("Spectral", {"rms": True}),
    "SpectralConv": ("SpectralConv", {}),
    "Sign": ("Sign", {}),
    "Sign, not normalized": ("Sign", {"normalized": False}),
    "ColNorm": ("ColNorm", {}),
    "ColNorm, normalized": ("ColNorm", {"normalized": True}),
    "RowNorm": ("RowNorm", {}),
    "RowNorm, not normalized": ("RowNorm", {"normalized": False}),
    "BiasRMS": ("BiasRMS", {}),
    "Euclidean": ("Euclidean", {}),
    "Auto": ("Auto", {}),
}
ITERATED = {"Spectral", "SpectralConv", "Auto"}
every_norm = pytest.mark.parametrize(("name", "options"), NORMS.values(), ids=NORMS)
every_closed_form = pytest.mark.parametrize(
    ("name", "options"), [row for row in NORMS.values() if row[0] not in ITERATED]
)

# Tall, wide, square, 1×n, n×1, 1×1, windows, several axes of a kind, batches of 1 and more.
ARRAYS = [
    ("io", (6, 3)),
    ("oi", (6, 3)),
    ("io", (4, 4)),
    ("io", (1, 5)),
    ("oi", (1, 5)),
    ("io", (1, 1)),
    ("ssio", (3, 2, 2, 5)),
    ("biio", (2, 3, 2, 4)),
    ("iboo", (4, 3, 2, 2)),
    ("biso", (1, 3, 2, 4)),
    ("bo", (3, 4)),
]


def arrays_for(name, options=()):
    """Lists layouts and shapes that a norm reads: with options, which scale only, some of them."""
    arrays = ARRAYS[::4] + ARRAYS[6:7] if options else ARRAYS
    return [case for case in arrays if name != "SpectralConv" or "s" in case[0]]


def make(name, options, layout, exact=False, compute_dtype=jnp.float32, **more):
    """Builds a norm, that iterates in float32 unless the test is about the default's rounding."""
    if name in ITERATED:
        method = ExactPolar() if exact else NewtonSchulz(compute_dtype=compute_dtype)
        more["orthogonalizer"] = method
    return getattr(scion_jax, name)(layout=layout, **options, **more)


def with_radius(norm, radius):
    """The norm with another radius, of vectors too."""
    radii = {"vector_radius": radius} if isinstance(norm, scion_jax.Auto) else {}
    return dataclasses.replace(norm, radius=radius, **radii)


def gaussian(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@functools.cache
def measured(norm):
    """Compiles everything a norm computes; the radius is an argument, to compile only once."""

    def measure(d, radius):
        scaled = with_radius(norm, radius)
        v = scaled.lmo(d)
        return {
            "lmo": v,
            "gauge": scaled.gauge(d),
            "dual_norm": scaled.dual_norm(d),
            "gauge of lmo": scaled.gauge(v),
            "pairing": jnp.sum(d * v, dtype=jnp.float32),
        }

    return jax.jit(measure)
