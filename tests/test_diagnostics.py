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
    clipped_scion,
    dual_norm,
    frank_wolfe_gap,
    gauge_bounds,
    gauges,
    init_params,
    pairings,
    scion,
    unconstrained_clipped_scion,
    unconstrained_scion,
)
from tests.support import naive

pytestmark = pytest.mark.unoptimized

NORMS = {"hidden": Spectral(3.0), "bias": BiasRMS(2.0), "head": Sign(20.0)}
EXACT = NORMS | {"hidden": Spectral(3.0, orthogonalizer=ExactPolar())}
LABELS = {"layer": {"kernel": "hidden", "bias": "bias"}, "head": "head"}
PATHS = {"layer/kernel", "layer/bias", "head"}


def tree(seed, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    return {"layer": {"kernel": draw(4, 6), "bias": draw(6)}, "head": draw(6, 5)}


def by_path(tree):
    return {"head": tree["head"], **{f"layer/{k}": v for k, v in tree["layer"].items()}}


def expected(function, tree):
    def naively(array, label):
        norm, layout = NORMS[label], "o" if array.ndim == 1 else "io"
        return function(type(norm).__name__, array, layout, norm.radius)

    return jax.tree.map(naively, tree, LABELS)


def assert_close(found, wanted, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), found, wanted)


def test_gauges_dual_norms_and_the_gap(x64):
    x, d = tree(0), tree(1)
    assert_close(gauges(x, NORMS, LABELS), expected(naive.gauge, x))
    found, wanted = dual_norm(d, NORMS, LABELS), expected(naive.dual_norm, d)
    assert_close(found.leaves, wanted)
    np.testing.assert_allclose(found.total, sum(jax.tree.leaves(wanted)), rtol=1e-9)
    pairing = sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(np.asarray(a * b)), x, d)))
    gap = frank_wolfe_gap(x, d, NORMS, LABELS)
    np.testing.assert_allclose(gap, pairing + found.total, rtol=1e-9)
    inside = init_params(jax.random.key(0), d, NORMS, LABELS)
    assert float(frank_wolfe_gap(inside, d, NORMS, LABELS)) >= 0
    extreme = jax.tree.map(lambda v: jnp.asarray(-v), expected(naive.lmo, d))
    np.testing.assert_allclose(frank_wolfe_gap(extreme, d, NORMS, LABELS), 0, atol=1e-9)


def test_dtypes_and_named_leaves(x64):
    x, d = tree(0, jnp.bfloat16), tree(1, jnp.bfloat16)
    gap = jax.jit(lambda x, d: frank_wolfe_gap(x, d, NORMS, LABELS))(x, d)
    assert gap.dtype == jnp.float32  # low precision is summed in float32
    np.testing.assert_allclose(gap, frank_wolfe_gap(x, d, NORMS, LABELS), rtol=1e-5)
    assert frank_wolfe_gap(tree(0, jnp.float32), tree(1), NORMS, LABELS).dtype == jnp.float64
    assert dual_norm({}, NORMS, {}).total == 0
    with pytest.raises(ValueError, match="'conv' of shape"):
        gauges({"conv": jnp.ones((2, 3, 4))})


# Flat, for loggers


def test_gauge_bounds_lie_between_the_gauges_and_their_promise(x64):
    x = tree(2)
    bounds = jax.jit(lambda x: gauge_bounds(x, NORMS, LABELS))(x)
    assert bounds.keys() == PATHS
    for path, gauge in by_path(gauges(x, NORMS, LABELS)).items():
        rows = 4 if path == "layer/kernel" else 1
        assert gauge * (1 - 1e-9) <= bounds[path] <= gauge * rows ** (1 / 256) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("build", "plain"), [(unconstrained_clipped_scion, unconstrained_scion), (clipped_scion, scion)]
)
def test_pairings_of_the_optimizer_without_clipping(x64, build, plain):
    """Unconstrained they are the dual norms of the leaves, constrained the Frank–Wolfe gap."""
    d = tree(1)
    x = init_params(jax.random.key(0), d, NORMS, LABELS)
    watched = build(0.1, EXACT, LABELS, rho=0.0, momentum=1.0, per_leaf=True)
    updates, state = jax.jit(watched.update)(d, watched.init(x), x)
    unwatched = plain(0.1, EXACT, LABELS, momentum=1.0)
    assert_close(updates, jax.jit(unwatched.update)(d, unwatched.init(x), x)[0])
    wanted, found = by_path(dual_norm(d, NORMS, LABELS).leaves), pairings(state, x)
    if plain is scion:
        products = by_path(jax.tree.map(lambda a, b: jnp.sum(a * b), x, d))
        wanted = {path: wanted[path] + products[path] for path in wanted}
        total = frank_wolfe_gap(x, d, NORMS, LABELS)
        np.testing.assert_allclose(optax.tree.get(state, "pairing"), total, rtol=1e-6)
    assert found.keys() == PATHS
    assert_close(found, wanted, 1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "pairing"), sum(found.values()), rtol=1e-6)


def test_pairings_with_a_transformation_that_takes_nothing_more():
    """Some take no extra arguments, which other stages of a chain may need."""
    d = {"a": jnp.array([3.0, 4.0])}
    halve = optax.GradientTransformation(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None: (jax.tree.map(lambda u: u / 2, updates), state),
    )
    clipped = clip_by_pairing(halve, 25.0)
    updates, state = clipped.update(d, clipped.init(d), d, value=1.0)
    assert state.pairing == 12.5
    np.testing.assert_allclose(updates["a"], [0.75, 1.0])


def test_state_without_pairings_is_refused():
    x = tree(0, jnp.float32)
    for optimizer in (scion(0.1, NORMS, LABELS), clipped_scion(0.1, NORMS, LABELS, rho=1.0)):
        with pytest.raises(ValueError, match=r"per_leaf=True"):
            pairings(optimizer.init(x), x)
    state = clipped_scion(0.1, NORMS, LABELS, rho=1.0, per_leaf=True).init(x)
    with pytest.raises(ValueError, match="of 3 leaves, but these parameters have 1"):
        pairings(state, x["head"])
