"""Properties of every norm, over shapes, layouts and dtypes, and agreement with naive NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scion_jax
from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Euclidean,
    ExactPolar,
    NewtonSchulz,
    RowNorm,
    Sign,
    Spectral,
    SpectralConv,
    numerics,
)
from scion_jax.norms.leaves import Leaf, gauge_bounds, lmos
from tests.support import naive

pytestmark = pytest.mark.unoptimized

# name, options: every norm with every option.
NORMS = [
    ("Spectral", {}),
    ("Spectral", {"normalized": False}),
    ("Spectral", {"max": True}),
    ("SpectralConv", {}),
    ("Sign", {}),
    ("Sign", {"normalized": False}),
    ("ColNorm", {}),
    ("ColNorm", {"normalized": True}),
    ("RowNorm", {}),
    ("RowNorm", {"normalized": False}),
    ("BiasRMS", {}),
    ("Euclidean", {}),
    ("Auto", {}),
]
ITERATED = {"Spectral", "SpectralConv", "Auto"}
CLOSED_FORMS = [case for case in NORMS if case[0] not in ITERATED]
IDS = [f"{name}-{'-'.join(options)}" for name, options in NORMS]

# Tall, wide, square, 1×n, n×1, 1×1, windows, several axes of a kind, batches of 1 and more.
ARRAYS = [
    ("io", (6, 3)),
    ("oi", (6, 3)),
    ("io", (4, 4)),
    ("io", (1, 5)),
    ("oi", (1, 5)),
    ("io", (1, 1)),
    ("ssio", (3, 2, 2, 5)),
    ("iboo", (4, 3, 2, 2)),
    ("biso", (1, 3, 2, 4)),
    ("bo", (3, 4)),
]


def make(name, options, layout, exact=False, compute_dtype=jnp.float32):
    """Builds a norm, that iterates in float32 unless the test is about the default's rounding."""
    options = dict(options)
    if name in ITERATED:
        options["orthogonalizer"] = (
            ExactPolar() if exact else NewtonSchulz(compute_dtype=compute_dtype)
        )
    return getattr(scion_jax, name)(layout=layout, **options)


def arrays_for(name):
    return [case for case in ARRAYS if name != "SpectralConv" or "s" in case[0]]


def gaussian(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def measured(norm):
    """Compiles everything a norm computes; the radius is an argument, to compile only once."""

    def measure(d, radius):
        radii = {"radius": radius} | ({"vector_radius": radius} if isinstance(norm, Auto) else {})
        scaled = dataclasses.replace(norm, **radii)
        v = scaled.lmo(d)
        return {
            "lmo": v,
            "gauge": scaled.gauge(d),
            "dual_norm": scaled.dual_norm(d),
            "gauge of lmo": scaled.gauge(v),
            "pairing": jnp.sum(d * v, dtype=jnp.float32),
        }

    return jax.jit(measure)


cases = pytest.mark.parametrize(("name", "options"), NORMS, ids=IDS)
iterated = pytest.mark.parametrize("name", sorted(ITERATED))
seeds = st.integers(0, 2**16)
radii = st.sampled_from([1.0, 0.02, 3000.0])


@cases
@given(data=st.data(), seed=seeds, radius=radii)
def test_agreement_with_the_formulas(x64, name, options, data, seed, radius):
    layout, shape = data.draw(st.sampled_from(arrays_for(name)))
    d = gaussian(shape, seed)
    result = measured(make(name, options, layout, exact=True))(jnp.asarray(d), radius)
    for method in ("lmo", "gauge", "dual_norm"):
        expected = getattr(naive, method)(name, d, layout, radius, **options)
        np.testing.assert_allclose(result[method], expected, rtol=1e-9, atol=1e-12 * radius)


@cases
@given(data=st.data(), seed=seeds, radius=radii)
def test_feasibility_and_attainment(name, options, data, seed, radius):
    layout, shape = data.draw(st.sampled_from(arrays_for(name)))
    d = jnp.asarray(gaussian(shape, seed), jnp.float32)
    result = measured(make(name, options, layout))(d, radius)
    assert float(result["gauge of lmo"]) <= 1 + 1e-5
    if name in ITERATED:
        ratio = float(result["pairing"] / result["dual_norm"])
        assert 0.8 <= ratio <= 1 + 1e-5
    else:
        np.testing.assert_allclose(result["pairing"], result["dual_norm"], rtol=1e-5)


@iterated
@given(data=st.data(), seed=seeds)
def test_feasibility_by_default(name, data, seed):
    """In bfloat16, and on a CPU without it at least as good."""
    layout, shape = data.draw(st.sampled_from(arrays_for(name)))
    d = jnp.asarray(gaussian(shape, seed), jnp.float32)
    result = measured(make(name, {}, layout, compute_dtype=None))(d, 3.0)
    assert float(result["gauge of lmo"]) <= 1.005
    assert float(result["pairing"]) >= 0.8 * float(result["dual_norm"])


@cases
@given(data=st.data(), seed=seeds, exponent=st.integers(-30, 30))
def test_scale_invariance_in_float32(name, options, data, seed, exponent):
    layout, shape = data.draw(st.sampled_from(arrays_for(name)))
    d = gaussian(shape, seed)
    d = np.where(np.abs(d) < 0.1, 0.1, np.clip(d, -3, 3))
    lmo = measured(make(name, options, layout))
    expected = lmo(jnp.asarray(d, jnp.float32), 1.0)["lmo"]
    result = lmo(jnp.asarray(d * 10.0**exponent, jnp.float32), 1.0)["lmo"]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@cases
@given(data=st.data(), seed=seeds, factor=st.sampled_from([1e-3, 1e-2, 1.0, 30.0, 1e4]))
def test_float16_arrays_at_any_scale(name, options, data, seed, factor):
    layout, shape = data.draw(st.sampled_from(arrays_for(name)))
    d = gaussian(shape, seed)
    d = np.where(np.abs(d) < 0.1, 0.1, np.clip(d, -3, 3))
    scaled = jnp.asarray(d * factor, jnp.float16)
    norm = make(name, options, layout)
    result = measured(norm)(scaled, 1.0)
    assert result["lmo"].dtype == jnp.float16
    assert result["gauge"].dtype == result["dual_norm"].dtype == jnp.float32
    assert float(result["gauge of lmo"]) <= 1 + 1e-3
    rounded = jnp.asarray(np.asarray(scaled, np.float64) / factor, jnp.float32)
    expected = measured(norm)(rounded, 1.0)["lmo"]
    np.testing.assert_allclose(result["lmo"].astype(jnp.float32), expected, rtol=2e-3, atol=2e-3)


@cases
def test_bfloat16_arrays(name, options):
    layout, shape = arrays_for(name)[-1]
    norm = make(name, options, layout)
    d = jnp.asarray(gaussian(shape), jnp.bfloat16)
    result = measured(norm)(d, 3.0)
    assert result["lmo"].dtype == jnp.bfloat16
    assert float(result["gauge of lmo"]) <= 1 + 2**-7
    expected = measured(norm)(d.astype(jnp.float32), 3.0)["lmo"]
    np.testing.assert_allclose(result["lmo"].astype(jnp.float32), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@cases
def test_zero_gives_zero(x64, name, options, dtype):
    for layout, shape in [
        arrays_for(name)[0],
        ("bsio", (0, 2, 3, 4)),
        ("sio", (0, 2, 3)),
        ("sio", (2, 0, 3)),
        ("sio", (2, 3, 0)),
    ]:
        norm = make(name, options, layout)
        zero = jnp.zeros(shape, dtype)
        result = norm.lmo(zero)
        assert (result.shape, result.dtype) == (zero.shape, zero.dtype)
        assert not bool(jnp.any(result != 0))
        assert float(norm.gauge(zero)) == float(norm.dual_norm(zero)) == 0
        leaf = Leaf("", norm.resolve(zero.ndim), norm.resolve(zero.ndim).read(shape))
        assert float(gauge_bounds([leaf], [zero])[0]) == 0


@cases
@given(data=st.data(), seed=seeds)
def test_layout_equivariance(name, options, data, seed):
    layout, shape = data.draw(st.sampled_from(arrays_for(name)))
    turns = data.draw(st.integers(1, max(len(layout) - 1, 1)))
    order = np.roll(np.arange(len(layout)), turns)
    d = jnp.asarray(gaussian(shape, seed), jnp.float32)
    one = measured(make(name, options, layout))(d, 1.0)
    other = measured(make(name, options, "".join(layout[a] for a in order)))(
        jnp.transpose(d, order), 1.0
    )
    np.testing.assert_allclose(other["lmo"], jnp.transpose(one["lmo"], order), atol=1e-4)
    for size in ("gauge", "dual_norm"):
        np.testing.assert_allclose(other[size], one[size], rtol=1e-5)


@cases
def test_batch_axes_are_independent(name, options):
    for layout, shape in arrays_for(name)[:1] + arrays_for(name)[-2:]:
        stack = jnp.asarray(gaussian((3, *shape)), jnp.float32)
        together = measured(make(name, options, "b" + layout))(stack, 1.0)
        alone = [measured(make(name, options, layout))(d, 1.0) for d in stack]
        np.testing.assert_allclose(
            together["lmo"], jnp.stack([one["lmo"] for one in alone]), atol=1e-5
        )
        np.testing.assert_allclose(together["gauge"], max(one["gauge"] for one in alone), rtol=1e-5)
        np.testing.assert_allclose(
            together["dual_norm"], sum(one["dual_norm"] for one in alone), rtol=1e-5
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("exact", [False, True])
@cases
def test_nan_and_infinity_stay_visible_and_local(name, options, bad, exact):
    layout = "bsio" if name == "SpectralConv" else "bio"
    clean = gaussian((3, 2, 4, 5) if name == "SpectralConv" else (3, 4, 5)).astype(np.float32)
    spoiled = clean.copy()
    spoiled[(1,) * clean.ndim] = bad
    norm = make(name, options, layout, exact=exact)
    v, w = norm.lmo(jnp.asarray(clean)), norm.lmo(jnp.asarray(spoiled))
    assert bool(jnp.any(jnp.isnan(w[1])))
    np.testing.assert_allclose(w[jnp.array([0, 2])], v[jnp.array([0, 2])], atol=1e-6)
    assert not np.isfinite(norm.gauge(jnp.asarray(spoiled)))
    assert not np.isfinite(norm.dual_norm(jnp.asarray(spoiled)))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(Sign(), (70, 70)), (RowNorm(), (2, 5000)), (ColNorm(), (5000, 2))],
)
def test_nan_among_many_numbers_stays_visible(norm, shape):
    """XLA for CPUs forgets NaN in a maximum over 4,096 entries or more."""
    spoiled = jnp.ones(shape).at[1, 1].set(jnp.nan)
    assert bool(jnp.isnan(norm.gauge(spoiled)))
    assert bool(jnp.isnan(jax.jit(norm.gauge)(spoiled)))
    gradient = jax.grad(norm.gauge)(jnp.ones(shape).at[1, 1].set(2.0))
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert float(gradient[1, 1]) > 0


@cases
@given(data=st.data(), seed=seeds)
def test_duality(name, options, data, seed):
    """|⟨d, x⟩| ≤ ‖d‖_* ‖x‖, and both are homogeneous."""
    layout, shape = data.draw(st.sampled_from(arrays_for(name)))
    d, x = (jnp.asarray(gaussian(shape, seed + i), jnp.float32) for i in (0, 1))
    measure = measured(make(name, options, layout))
    of_d, of_x, of_multiple = measure(d, 0.5), measure(x, 0.5), measure(-4 * d, 0.5)
    # With a batch the gauge is a maximum and the dual norm a sum, so the inequality still holds.
    assert abs(float(jnp.vdot(d, x))) <= float(of_d["dual_norm"] * of_x["gauge"]) * (1 + 1e-5)
    for size in ("gauge", "dual_norm"):
        np.testing.assert_allclose(of_multiple[size], 4 * of_d[size], rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), CLOSED_FORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sizes_neither_overflow_nor_vanish(name, options, scale):
    x = jnp.asarray(gaussian((6, 3)), jnp.float32)
    measure = measured(make(name, options, "io"))
    for size in ("gauge", "dual_norm"):
        np.testing.assert_allclose(
            measure(x * scale, 1.0)[size], measure(x, 1.0)[size] * scale, rtol=1e-5
        )


@pytest.mark.fast
@pytest.mark.parametrize(("dtype", "most"), [("float32", 36), ("float64", 300)])
def test_lengths_at_every_scale(x64, dtype, most):
    """Of whole arrays, and in the one reduction over devices that split arrays need."""
    x = gaussian(40)
    scales = 10.0 ** np.arange(-most, most + 1, most // 12)
    arrays = jnp.asarray(x * scales[:, None], dtype)
    root, unit = numerics._in_one_pass(arrays, (1,))
    assert float(numerics.vector_norms([jnp.zeros(0, dtype)])[0]) == 0
    for lengths in (numerics.vector_norms(list(arrays)), (unit * root)[:, 0]):
        expected = np.linalg.norm(x) * scales
        np.testing.assert_allclose(np.asarray(lengths, np.float64), expected, rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@cases
def test_init_is_on_the_ball_or_zero(x64, name, options, dtype):
    empty = [("bsio", (0, 2, 3, 4)), ("sio", (2, 0, 3)), ("sio", (2, 0, 0))]
    for layout, shape in [*arrays_for(name)[::3], *empty]:
        norm = dataclasses.replace(make(name, options, layout), radius=5.0)
        x = norm.init(jax.random.key(1), shape, dtype)
        assert (x.shape, x.dtype) == (shape, jnp.dtype(dtype))
        letters = layout.replace("b", "")
        if 0 in shape or name == "BiasRMS" or (name == "Auto" and len(letters) == 1):
            assert not bool(jnp.any(x != 0))
        else:
            tolerance = max(4 * float(jnp.finfo(dtype).eps), 1e-12)
            np.testing.assert_allclose(norm.gauge(x), 1, atol=tolerance)


def test_spectral_init_is_semi_orthogonal_and_uniform():
    norm = Spectral(layout="oi", normalized=False)
    for shape in [(6, 4), (4, 6)]:
        draws = jax.vmap(lambda key, shape=shape: norm.init(key, shape))(
            jax.random.split(jax.random.key(0), 2000)
        )
        small = draws / np.sqrt(shape[0])
        gram = np.einsum("nab,ncb->nac" if shape[0] < shape[1] else "nba,nbc->nac", small, small)
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(4), gram.shape), atol=1e-5)
        np.testing.assert_allclose(small.mean(0), 0, atol=0.05)  # no preferred sign


def test_float64_is_what_jax_makes_of_it():
    assert Sign().init(jax.random.key(0), (3, 4), np.float64).dtype == jnp.float32


def test_sign_zero_init():
    assert not bool(jnp.any(Sign(zero_init=True).init(jax.random.key(0), (3, 4))))


def test_convolution_counts_its_window():
    """One spectral unit of a 3×3 convolution: every output keeps the RMS of its input's window."""
    norm = SpectralConv(layout="ssio")
    v = norm.lmo(jnp.asarray(gaussian((3, 3, 4, 6)), jnp.float32))
    flat = np.asarray(v).reshape(36, 6)
    assert np.linalg.norm(flat, 2) == pytest.approx(np.sqrt(6 / 4) / 9, rel=0.06)


@pytest.mark.fast
def test_norms_are_values():
    assert Spectral(50.0) == Spectral(radius=50.0)
    assert len({Spectral(50.0), Spectral(50.0), Spectral(50.0, max=True)}) == 2
    assert dataclasses.replace(Sign(2.0), radius=3.0) == Sign(3.0)
    assert jax.tree.leaves(Sign(2.0)) == [Sign(2.0)]  # a leaf, not a container
    for kind in {name for name, _ in NORMS}:
        for attribute in ("radius", "raduis"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(getattr(scion_jax, kind)(), attribute, 2.0)
    with pytest.raises(TypeError):
        Spectral(1.0, "io")


@pytest.mark.fast
@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), float("inf"), np.float32(-1)])
def test_radius_must_be_positive(radius):
    with pytest.raises(ValueError, match="radius must be above 0 and finite"):
        Sign(radius)


@pytest.mark.fast
def test_radius_may_be_traced():
    d = jnp.asarray(gaussian((3, 4)), jnp.float32)
    radii = jnp.array([0.5, 2.0, 50.0])
    for kind in (Spectral, Sign, ColNorm, RowNorm, BiasRMS, Euclidean, Auto):

        def norm(radius, kind=kind):
            return kind(radius, layout="io")

        mapped = jax.vmap(lambda r, norm=norm: norm(r).lmo(d))(radii)
        for radius, v in zip(radii, mapped, strict=True):
            np.testing.assert_allclose(v, norm(float(radius)).lmo(d), rtol=1e-4, atol=1e-4)
        gauges = jax.vmap(lambda r, norm=norm: norm(r).gauge(d))(radii)
        np.testing.assert_allclose(gauges, norm(1.0).gauge(d) / radii, rtol=1e-5)


@pytest.mark.fast
def test_spectral_conv_needs_a_window():
    with pytest.raises(ValueError, match="no window axis 's'"):
        SpectralConv().lmo(jnp.ones((3, 4)))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_only_floating_arrays(dtype):
    with pytest.raises(TypeError, match=dtype):
        Sign().lmo(jnp.ones((2, 2), dtype))


@pytest.mark.fast
def test_as_a_flax_initializer():
    linen = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")
    norm = Spectral(50.0)
    dense = linen.Dense(8, kernel_init=norm.init, bias_init=BiasRMS().init)
    kernel = dense.init(jax.random.key(0), jnp.ones((1, 4)))["params"]["kernel"]
    assert float(norm.gauge(kernel)) == pytest.approx(1, abs=1e-5)
    linear = nnx.Linear(4, 8, kernel_init=norm.init, rngs=nnx.Rngs(0))
    assert float(norm.gauge(linear.kernel[...])) == pytest.approx(1, abs=1e-5)


def test_leaves_together_are_leaves_alone():
    shapes = [(3, 5), (5, 3), (5,), (4, 4), (3, 5), (2, 2, 3, 5)]
    ds = [jnp.asarray(gaussian(shape, i), jnp.float32) for i, shape in enumerate(shapes)]
    norms = [Auto(2.0), Spectral(3.0, layout="oi"), Auto(vector_radius=5.0), Spectral(max=True)]
    norms += [Spectral(orthogonalizer=ExactPolar()), SpectralConv()]
    leaves = [
        Leaf("", n.resolve(d.ndim), n.resolve(d.ndim).read(d.shape))
        for n, d in zip(norms, ds, strict=True)
    ]
    together = lmos(leaves, ds)
    for d, v, norm in zip(ds, together, norms, strict=True):
        np.testing.assert_allclose(v, norm.lmo(d), atol=1e-5)
    backwards = lmos(leaves[::-1], ds[::-1])[::-1]
    for v, w in zip(together, backwards, strict=True):
        np.testing.assert_allclose(v, w, atol=1e-5)
