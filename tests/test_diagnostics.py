"""Diagnostics of whole trees, against the naive formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import naive
from scion_jax import (
    BiasRMS,
    Sign,
    Spectral,
    dual_norm,
    frank_wolfe_gap,
    gauges,
    init_params,
    vanishing_momentum,
)

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

NORMS = {"hidden": Spectral(3.0), "bias": BiasRMS(2.0), "head": Sign(20.0)}
LABELS = {"layer": {"kernel": "hidden", "bias": "bias"}, "head": "head"}


def tree(seed, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    shapes = {"layer": {"kernel": (4, 6), "bias": (6,)}, "head": (6, 5)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def expected(function, array, label):
    norm = NORMS[label]
    layout = "o" if array.ndim == 1 else "io"
    return function(type(norm).__name__, array, layout, norm.radius)


def test_gauges(x64):
    x = tree(0)
    result = gauges(x, NORMS, LABELS)
    wanted = jax.tree.map(lambda x, label: expected(naive.gauge, x, label), x, LABELS)
    assert jax.tree.structure(result) == jax.tree.structure(x)
    np.testing.assert_allclose(jax.tree.leaves(result), jax.tree.leaves(wanted), rtol=1e-9)


def test_dual_norm(x64):
    d = tree(1)
    result = dual_norm(d, NORMS, LABELS)
    wanted = jax.tree.map(lambda d, label: expected(naive.dual_norm, d, label), d, LABELS)
    np.testing.assert_allclose(jax.tree.leaves(result.leaves), jax.tree.leaves(wanted), rtol=1e-9)
    np.testing.assert_allclose(result.total, sum(jax.tree.leaves(wanted)), rtol=1e-9)


def test_frank_wolfe_gap(x64):
    x, d = tree(0), tree(1)
    pairing = sum(
        float(np.sum(np.asarray(a) * np.asarray(b)))
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(d), strict=True)
    )
    gap = frank_wolfe_gap(x, d, NORMS, LABELS)
    np.testing.assert_allclose(gap, pairing + dual_norm(d, NORMS, LABELS).total, rtol=1e-9)


def test_gap_is_nonnegative_inside_and_zero_at_the_extreme_point(x64):
    d = tree(1)
    inside = init_params(jax.random.key(0), d, NORMS, LABELS)
    assert float(frank_wolfe_gap(inside, d, NORMS, LABELS)) >= 0
    extreme = jax.tree.map(lambda d, label: jnp.asarray(-expected(naive.lmo, d, label)), d, LABELS)
    np.testing.assert_allclose(frank_wolfe_gap(extreme, d, NORMS, LABELS), 0, atol=1e-9)


def test_low_precision_is_summed_in_float32_and_jit_works():
    x, d = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    gap = jax.jit(lambda x, d: frank_wolfe_gap(x, d, NORMS, LABELS))(x, d)
    assert gap.dtype == jnp.float32
    np.testing.assert_allclose(gap, frank_wolfe_gap(x, d, NORMS, LABELS), rtol=1e-5)
    assert dual_norm({}, NORMS, {}).total == 0


def test_mixed_dtypes_and_named_leaves(x64):
    assert frank_wolfe_gap(tree(0, jnp.float32), tree(1), NORMS, LABELS).dtype == jnp.float64
    with pytest.raises(ValueError, match="'conv' of shape"):
        gauges({"conv": jnp.ones((2, 3, 4))})


def test_vanishing_momentum():
    schedule = vanishing_momentum()
    np.testing.assert_allclose([schedule(k) for k in range(3)], [1, 2**-0.5, 3**-0.5], rtol=1e-6)
    assert jax.jit(schedule)(jnp.int32(3)) == 0.5
