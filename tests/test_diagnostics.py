"""Diagnostics of whole trees, against the naive formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import (
    BiasRMS,
    ExactPolar,
    Sign,
    Spectral,
    clip_by_pairing,
    dual_norm,
    frank_wolfe_gap,
    gauge_bounds,
    gauges,
    init_params,
    measure_pairing,
    pairings,
    scion,
    unconstrained_scion,
    vanishing_momentum,
)
from tests.support import naive

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


# Flat, for loggers

PATHS = {"layer/kernel", "layer/bias", "head"}
EXACT = NORMS | {"hidden": Spectral(3.0, orthogonalizer=ExactPolar())}


def by_path(tree):
    return {"head": tree["head"], **{f"layer/{k}": v for k, v in tree["layer"].items()}}


def test_gauge_bounds_lie_between_the_gauges_and_their_promise(x64):
    x = tree(2)
    bounds, exact = (
        jax.jit(lambda x: gauge_bounds(x, NORMS, LABELS))(x),
        by_path(gauges(x, NORMS, LABELS)),
    )
    assert bounds.keys() == PATHS
    for path, gauge in exact.items():
        rows = 4 if path == "layer/kernel" else 1
        assert gauge * (1 - 1e-9) <= bounds[path] <= gauge * rows ** (1 / 256) * (1 + 1e-9)


def test_pairings_are_the_dual_norms_of_the_leaves(x64):
    x, d = tree(0), tree(1)
    optimizer = unconstrained_scion(0.1, EXACT, LABELS, momentum=1.0, show_pairing=True)
    _, state = jax.jit(optimizer.update)(d, optimizer.init(x), x)
    wanted = dual_norm(d, NORMS, LABELS)
    found = pairings(state, x)
    assert found.keys() == PATHS
    for path, number in by_path(wanted.leaves).items():
        np.testing.assert_allclose(found[path], number, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "pairing"), wanted.total, rtol=1e-6)


def test_constrained_pairing_is_the_frank_wolfe_gap(x64):
    d = tree(1)
    x = init_params(jax.random.key(0), d, NORMS, LABELS)
    plain = scion(0.1, EXACT, LABELS, momentum=1.0)
    optimizer = scion(0.1, EXACT, LABELS, momentum=1.0, show_pairing=True)
    updates, state = optimizer.update(d, optimizer.init(x), x)
    gap = frank_wolfe_gap(x, d, NORMS, LABELS)
    np.testing.assert_allclose(optax.tree.get(state, "pairing"), gap, rtol=1e-6)
    np.testing.assert_allclose(sum(pairings(state, x).values()), gap, rtol=1e-6)
    wanted, _ = plain.update(d, plain.init(x), x)
    for one, other in zip(*map(jax.tree.leaves, (updates, wanted)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_pairings_with_a_transformation_that_takes_nothing_more():
    """Some take no extra arguments, which other stages of a chain may need."""
    d = {"a": jnp.array([3.0, 4.0])}
    halve = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (jax.tree.map(lambda u: u / 2, updates), state),
    )
    measured = measure_pairing(halve)
    _, state = measured.update(d, measured.init(d), d, value=1.0)
    assert state.pairing == 12.5
    clipped = clip_by_pairing(halve, 25.0)
    updates, _ = clipped.update(d, clipped.init(d), d, value=1.0)
    np.testing.assert_allclose(updates["a"], [0.75, 1.0])


def test_state_without_pairings_is_refused():
    x = tree(0, jnp.float32)
    for build in (scion, unconstrained_scion):
        with pytest.raises(ValueError, match=r"has 0 fields `pairings`.*show_pairing=True"):
            pairings(build(0.1, NORMS, LABELS).init(x), x)
    state = scion(0.1, NORMS, LABELS, show_pairing=True).init(x)
    with pytest.raises(ValueError, match="of 3 leaves, but these parameters have 1"):
        pairings(state, x["head"])
