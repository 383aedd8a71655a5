"""Clipping: the pairing over all leaves, the state, the short step's bound, and life outside."""

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
    clip_by_pairing,
    clipped_scion,
    init_params,
    measure_pairing,
    scale_by_lmo,
    unconstrained_clipped_scion,
)
from scion_jax.distributed.spreading import spectral_norm_bounds
from scion_jax.norms.leaves import Leaf, gauge_bounds

pytestmark = pytest.mark.fast

NORMS = {"one": Spectral(3.0), "other": Sign(5.0)}
LABELS = {"a": "one", "c": "other"}


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {key: jnp.asarray(rng.standard_normal((4, 6)), dtype) for key in "ac"}


def test_pairing_runs_over_all_labels():
    d = tree()
    optimizer = unconstrained_clipped_scion(1.0, NORMS, LABELS, rho=80.0, momentum=1.0)
    updates, state = optimizer.update(d, optimizer.init(d), d)
    v = {"a": NORMS["one"].lmo(d["a"]), "c": NORMS["other"].lmo(d["c"])}
    pairing = float(jnp.vdot(d["a"], v["a"]) + jnp.vdot(d["c"], v["c"]))
    assert pairing < 80
    assert float(optax.tree.get(state, "pairing")) == pytest.approx(pairing, rel=1e-5)
    assert float(optax.tree.get(state, "factor")) == pytest.approx(pairing / 80, rel=1e-5)
    for key in "ac":
        np.testing.assert_allclose(updates[key], -pairing / 80 * v[key], rtol=1e-4)


def bounds_of(norm, xs):
    leaves = [Leaf("", norm.resolve(x.ndim), norm.resolve(x.ndim).read(x.shape)) for x in xs]
    return gauge_bounds(leaves, xs)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_pairing_is_summed_in_float32(dtype):
    d = {"w": jnp.full((64, 64), 0.1, dtype)}
    optimizer = unconstrained_clipped_scion(1.0, Sign(64.0), rho=1.0, momentum=1.0)
    updates, state = optimizer.update(d, optimizer.init(d), d)
    pairing = optax.tree.get(state, "pairing")
    assert pairing.dtype == jnp.float32
    assert float(pairing) == pytest.approx(64 * 64 * float(d["w"][0, 0]), rel=1e-5)
    assert updates["w"].dtype == dtype


def test_rho_schedule_counts_updates():
    clip = clip_by_pairing(scale_by_lmo(Euclidean()), lambda count: jnp.array([10.0, 20.0])[count])
    d = jnp.array([3.0, 4.0])
    state = clip.init(d)
    _, state = clip.update(d, state)
    assert float(state.factor) == pytest.approx(0.5)
    _, state = clip.update(d, state)
    assert float(state.factor) == pytest.approx(0.25)
    assert int(state.count) == 2


@pytest.mark.parametrize("rho", [0.0, -1.0, 0, float("nan")])
def test_rho_must_be_positive(rho):
    for build in (clipped_scion, unconstrained_clipped_scion):
        with pytest.raises(ValueError, match="rho must be above 0"):
            build(0.1, rho=rho)


def test_zero_gradients_give_zero_steps():
    params = tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    for short_step in (False, True):
        optimizer = clipped_scion(0.5, NORMS, LABELS, rho=1.0, short_step=short_step)
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
        assert not any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(updates))


def test_nan_is_not_hidden():
    d = tree()
    d["a"] = d["a"].at[0, 0].set(jnp.nan)
    optimizer = unconstrained_clipped_scion(1.0, NORMS, LABELS, rho=40.0)
    updates, state = optimizer.update(d, optimizer.init(d), d)
    assert bool(jnp.isnan(optax.tree.get(state, "pairing")))
    assert bool(jnp.all(jnp.isnan(updates["c"])))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rounding_cannot_make_a_direction_longer_than_itself(dtype):
    """Straight downhill the cosine is −1, or by rounding a little less: nothing is NaN then."""
    for seed in range(20):
        d = {"a": jnp.asarray(np.random.default_rng(seed).standard_normal(37), dtype)}
        clip = clip_by_pairing(optax.scale(-0.7), 1e-3)
        updates, state = clip.update(d, clip.init(d))
        assert 0 <= float(state.factor) <= 1
        assert np.abs(np.asarray(updates["a"], np.float32)).max() < 0.05


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_spectral_norm_bound(rows):
    rng = np.random.default_rng(rows)
    stack = rng.standard_normal((5, rows, 80)).astype(np.float32)
    stack[1] = np.linalg.qr(rng.standard_normal((80, rows)))[0].T  # equal singular values
    stack[2] = np.outer(rng.standard_normal(rows), rng.standard_normal(80))
    stack[3] *= 1e25
    stack[4] = 0
    exact = np.linalg.norm(stack, 2, axis=(1, 2))
    wide = jnp.asarray(stack)
    for batches in ([wide], [wide.mT], [wide[:2], wide[2:].mT]):
        bound = jnp.concatenate(spectral_norm_bounds(batches))
        assert np.all(bound >= exact * (1 - 1e-5))
        assert np.all(bound <= exact * rows ** (1 / 256) * (1 + 1e-5))
        np.testing.assert_allclose(bound[1], rows ** (1 / 256), rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 0, 3), (5, 3, 0), (0, 2, 3)])
def test_empty_matrices_are_bounded_by_zero(shape):
    (bound,) = spectral_norm_bounds([jnp.zeros(shape)])
    assert bound.shape == shape[:1]
    assert not bound.any()


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
    for x, bound in zip(xs, bounds_of(norm, xs), strict=True):
        exact = float(norm.gauge(x))
        assert exact * (1 - 1e-5) <= float(bound) <= 1.03 * exact


def test_short_step_is_not_longer_than_the_exact_one():
    norms, labels = {"one": Spectral(3.0), "other": Sign(5.0)}, LABELS
    params = init_params(jax.random.key(0), tree(), norms, labels)
    d = tree(1)
    optimizer = clipped_scion(1.0, norms, labels, rho=1e4, short_step=True, momentum=1.0)
    _, state = optimizer.update(d, optimizer.init(params), params)
    w = {key: params[key] + norms[labels[key]].lmo(d[key]) for key in "ac"}
    size = max(float(norms[labels[key]].gauge(w[key])) for key in "ac")
    exact = sum(float(jnp.vdot(d[key], w[key])) for key in "ac") / (1e4 * size**2)
    assert 0.9 * exact <= float(optax.tree.get(state, "factor")) <= exact * (1 + 1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_outside_the_ball_no_step_climbs_and_none_stalls(scale):
    """x far out, where the loss likes it: the pull towards the ball would climb."""
    norm = Sign(1.0, normalized=False)
    x = {"out": jnp.array([[9.0, -6.0]]), "in": jnp.array([[0.5, 0.5]])}
    d = {"out": jnp.array([[-scale, scale / 2]]), "in": jnp.array([[scale, -scale]])}
    optimizer = clipped_scion(0.5, norm, rho=1e-3 * scale, momentum=1.0)
    state = optimizer.init(x)
    out = {"out": x["out"]}
    alone, _ = optimizer.update({"out": d["out"]}, optimizer.init(out), out)
    for updates in (optimizer.update(d, state, x)[0], alone):
        climb = {key: float(jnp.vdot(d[key], u)) for key, u in updates.items()}
        assert all(slope <= 1e-6 * scale for slope in climb.values())
        assert bool(jnp.any(updates["out"]))  # it moves, level: towards smaller x
        assert float(jnp.linalg.norm(x["out"] + updates["out"])) < float(jnp.linalg.norm(x["out"]))
    assert climb["out"] == pytest.approx(0, abs=1e-6 * scale)


def test_a_leaf_that_rests_outside_holds_up_no_other():
    """A scalar can only climb back or leave further; the other leaf still converges."""
    target = {"out": jnp.float32(10.0), "in": jnp.array([0.0, 0.2])}
    params = {"out": jnp.float32(5.0), "in": jnp.array([0.3, 0.0])}
    optimizer = clipped_scion(0.1, Euclidean(), rho=4.0, momentum=1.0)

    def step(carry, _):
        params, state = carry
        gradients = jax.tree.map(jnp.subtract, params, target)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimizer.init(params))
    (params, state), _ = jax.lax.scan(step, start, length=2000)
    assert float(params["out"]) == 5.0
    np.testing.assert_allclose(params["in"], target["in"], atol=2e-3)
    assert float(optax.tree.get(state, "factor")) < 0.01


@pytest.mark.parametrize("short_step", [False, True])
def test_no_rho_is_too_small(short_step):
    """0/0 is 1: with ρ = 0 nothing is clipped, whatever the gradient."""
    params = tree()
    for gradients in (tree(1), jax.tree.map(jnp.zeros_like, params)):
        for rho in (1e-40, 0.0):

            def step(rho, gradients=gradients):  # traced, so that 0 is taken
                optimizer = clipped_scion(0.1, NORMS, LABELS, rho=rho, short_step=short_step)
                return optimizer.update(gradients, optimizer.init(params), params)

            updates, state = jax.jit(step)(jnp.float32(rho))
            assert float(optax.tree.get(state, "factor")) == 1
            assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(updates))


def test_empty_leaves_spoil_nothing():
    params = {"w": jnp.ones((4, 3)), "empty": jnp.zeros((4, 0))}
    optimizer = clipped_scion(0.1, rho=1.0, short_step=True)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert bool(jnp.all(jnp.isfinite(updates["w"])))


@pytest.mark.parametrize("wrap", [lambda inner: clip_by_pairing(inner, 1.0), measure_pairing])
def test_what_is_wrapped_and_its_leaves_are_checked(wrap):
    with pytest.raises(TypeError, match="inner is a gradient transformation"):
        wrap(Euclidean())
    for leaf, message in ((3.0, "is 3.0, which is no array"), (jnp.int32(3), "has dtype int32")):
        with pytest.raises(TypeError, match=f"leaf 'x' of the parameters.* {message}"):
            wrap(optax.identity()).init({"x": leaf})
