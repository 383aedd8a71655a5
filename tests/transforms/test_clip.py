"""Clipping: the pairing over all leaves, the state, and the short step's bound."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import (
    Auto,
    Euclidean,
    RowNorm,
    Sign,
    Spectral,
    SpectralConv,
    clipped_scion,
    gauge_bounds,
    pairings,
    scion,
    unconstrained_clipped_scion,
)

pytestmark = pytest.mark.fast

NORMS = {"one": Spectral(3.0), "other": Sign(5.0)}
LABELS = {"a": "one", "c": "other"}


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {key: jnp.asarray(rng.standard_normal((4, 6)), dtype) for key in "ac"}


def test_pairing_runs_over_all_labels_and_is_kept_per_leaf():
    d = tree()
    for per_leaf in (False, True):
        optimizer = unconstrained_clipped_scion(
            1.0, NORMS, LABELS, rho=80.0, momentum=1.0, per_leaf=per_leaf
        )
        updates, state = optimizer.update(d, optimizer.init(d), d)
        v = {key: NORMS[LABELS[key]].lmo(d[key]) for key in "ac"}
        parts = [float(jnp.vdot(d[key], v[key])) for key in "ac"]
        pairing = sum(parts)
        assert pairing < 80
        assert float(optax.tree.get(state, "pairing")) == pytest.approx(pairing, rel=1e-5)
        assert float(optax.tree.get(state, "factor")) == pytest.approx(pairing / 80, rel=1e-5)
        for key in "ac":
            np.testing.assert_allclose(updates[key], -pairing / 80 * v[key], rtol=1e-4)
        kept = optax.tree.get(state, "pairings")
        if per_leaf:
            np.testing.assert_allclose(kept, parts, rtol=1e-5)
            assert pairings(state, d) == pytest.approx(
                dict(zip("ac", parts, strict=True)), rel=1e-5
            )
        else:
            assert kept is None


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_pairing_is_summed_in_float32(dtype):
    d = {"w": jnp.full((64, 64), 0.1, dtype)}
    optimizer = unconstrained_clipped_scion(1.0, Sign(64.0), rho=1.0, momentum=1.0)
    updates, state = optimizer.update(d, optimizer.init(d), d)
    pairing = optax.tree.get(state, "pairing")
    assert pairing.dtype == jnp.float32
    assert float(pairing) == pytest.approx(64 * 64 * float(d["w"][0, 0]), rel=1e-5)
    assert updates["w"].dtype == dtype


def test_nan_is_not_hidden():
    d = tree()
    d["a"] = d["a"].at[0, 0].set(jnp.nan)
    for rho in (40.0, 0.0):
        optimizer = unconstrained_clipped_scion(1.0, NORMS, LABELS, rho=rho)
        updates, state = optimizer.update(d, optimizer.init(d), d)
        assert bool(jnp.isnan(optax.tree.get(state, "pairing")))
        assert bool(jnp.isnan(updates["a"]).any())
        assert bool(jnp.isnan(updates["c"]).all()) or rho == 0


def spectral_bounds(matrices):
    """Bounds of largest singular values, of matrices of any shapes together."""
    trees = {f"{index:02}": matrix for index, matrix in enumerate(matrices)}
    norm = Spectral(layout="oi", normalized=False)
    bounds = jax.jit(lambda trees: gauge_bounds(trees, norm))(trees)
    scales = [np.sqrt(matrix.shape[0]) for matrix in matrices]
    return np.array([bounds[name] for name in sorted(trees)]) * scales


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_spectral_norm_bound(rows):
    rng = np.random.default_rng(rows)
    stack = rng.standard_normal((5, rows, 80)).astype(np.float32)
    stack[1] = np.linalg.qr(rng.standard_normal((80, rows)))[0].T  # equal singular values
    stack[2] = np.outer(rng.standard_normal(rows), rng.standard_normal(80))
    stack[3] *= 1e25
    stack[4] = 0
    exact = np.linalg.norm(stack, 2, axis=(1, 2))
    mixed = [x if index % 2 else x.T for index, x in enumerate(stack)]
    for matrices in (stack, mixed):
        bound = spectral_bounds(list(map(jnp.asarray, matrices)))
        assert np.all(bound >= exact * (1 - 1e-5))
        assert np.all(bound <= exact * rows ** (1 / 256) * (1 + 1e-5))
        np.testing.assert_allclose(bound[1], rows ** (1 / 256), rtol=1e-5)


MATRICES = [(8, 12), (12, 8), (4, 4), (0, 3)]
BOUNDED = [
    (Spectral(3.0), MATRICES),
    (Auto(3.0), MATRICES),
    (Sign(2.0), MATRICES),
    (Spectral(3.0, max=True, layout="oi"), MATRICES),
    (Spectral(2.0, normalized=False, layout="io[2]"), MATRICES[:3]),
    (Spectral(2.0, layout="i[5,3]o"), [(8, 12)]),
    (SpectralConv(3.0), [(3, 3, 4, 6), (1, 5, 6, 4), (3, 4, 4)]),
    (Spectral(2.0, layout="bio"), [(3, 4, 6), (2, 6, 4)]),
    (RowNorm(2.0, layout="ssio"), [(3, 3, 4, 6)]),
]


@pytest.mark.parametrize(("norm", "shapes"), BOUNDED)
def test_gauge_bounds_are_gauges_from_above(norm, shapes):
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    bounds = jax.jit(lambda xs: gauge_bounds(xs, norm))(xs)
    for index, x in enumerate(xs):
        exact = float(norm.gauge(x))
        assert exact * (1 - 1e-5) <= float(bounds[str(index)]) <= 1.03 * exact


def test_outside_of_the_ball():
    """The pull inwards may climb there: its size counts, so it stalls no other leaf."""
    norm = Sign(1.0, normalized=False)
    x = {"out": jnp.array([[9.0, -6.0]]), "in": jnp.array([[0.5, 0.5]])}
    d = {"out": jnp.array([[-1.0, 0.5]]), "in": jnp.array([[1.0, -1.0]])}
    optimizer = clipped_scion(0.5, norm, rho=100.0, momentum=1.0, per_leaf=True)
    updates, state = optimizer.update(d, optimizer.init(x), x)
    w = {key: x[key] + norm.lmo(d[key]) for key in x}
    parts = {key: float(jnp.vdot(d[key], w[key])) for key in x}
    assert parts["out"] < 0 < parts["in"]
    factor = sum(map(abs, parts.values())) / 100
    assert float(optax.tree.get(state, "factor")) == pytest.approx(factor)
    assert pairings(state, x) == pytest.approx(parts)
    for key in x:
        np.testing.assert_allclose(updates[key], -0.5 * factor * w[key], rtol=1e-5)
        assert norm.gauge(x[key] + updates[key]) <= max(1, norm.gauge(x[key]))


@pytest.mark.parametrize("short_step", [False, True])
def test_no_rho_is_too_small(short_step):
    """0/0 is 1: with ρ = 0 nothing is clipped, whatever the gradient; the pairing is kept."""
    params, options = tree(), {"short_step": short_step, "per_leaf": True}

    def step(rho, gradients):
        optimizer = clipped_scion(0.1, NORMS, LABELS, rho=rho, **options)
        return optimizer.update(gradients, optimizer.init(params), params)

    plain = scion(0.1, NORMS, LABELS)
    for gradients in (tree(1), jax.tree.map(jnp.zeros_like, params)):
        expected, _ = plain.update(gradients, plain.init(params), params)
        for rho in (1e-40, 0.0):
            updates, state = jax.jit(step)(jnp.float32(rho), gradients)  # traced, too
            assert float(optax.tree.get(state, "factor")) == 1
            for key in "ac":
                np.testing.assert_allclose(updates[key], expected[key], atol=1e-6)
        updates, state = step(0.0, gradients)
        assert float(optax.tree.get(state, "pairing")) >= 0
        assert set(pairings(state, params)) == {"a", "c"}


def test_empty_leaves_spoil_nothing():
    params = {"w": jnp.ones((4, 3)), "empty": jnp.zeros((4, 0))}
    optimizer = clipped_scion(0.1, rho=1.0, short_step=True)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert bool(jnp.all(jnp.isfinite(updates["w"])))


def test_pairings_of_several_groups_are_all_found():
    """`optax.tree.get` wants one; under `multi_transform` there is one for each group."""
    clip = {"x": clipped_scion(0.1, rho=1.0), "y": clipped_scion(0.1, Euclidean(), rho=1.0)}
    state = optax.multi_transform(clip, {"a": "x", "c": "y"}).init(tree())
    assert len(optax.tree.get_all_with_path(state, "pairing")) == 2
