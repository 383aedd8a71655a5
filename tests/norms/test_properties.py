"""What holds for every norm, over shapes, layouts and dtypes; see `tests.support.norms`."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scion_jax
from scion_jax import Sign, Spectral, gauge_bounds
from tests.support import naive
from tests.support.norms import (
    ARRAYS,
    ITERATED,
    NORMS,
    arrays_for,
    every_closed_form,
    every_norm,
    gaussian,
    make,
    measured,
    with_radius,
)
from tests.support.variants import every_variant, variant

pytestmark = pytest.mark.unoptimized

SIZES = ("gauge", "dual_norm")
EMPTY = [("bsio", (0, 2, 3, 4)), ("sio", (0, 2, 3)), ("sio", (2, 0, 3)), ("sio", (2, 3, 0))]
every_kind = pytest.mark.parametrize("name", sorted({name for name, _ in NORMS.values()}))
seeds = st.integers(0, 2**16)
radii = st.sampled_from([1.0, 0.02, 3000.0])


def of_all(name, options, function, exact=False):
    """Computes for every array that a norm reads, in one program: saves compiling many."""
    norms = [make(name, options, layout, exact=exact) for layout, _ in arrays_for(name, options)]
    return jax.jit(
        lambda ds, *rest: [function(n, d, *rest) for n, d in zip(norms, ds, strict=True)]
    )


def directions(name, options, seed, dtype=jnp.float32):
    return [
        jnp.asarray(gaussian(s, seed + i), dtype)
        for i, (_, s) in enumerate(arrays_for(name, options))
    ]


@every_norm
def test_agreement_with_the_formulas(x64, name, options):
    computed = of_all(name, options, lambda n, d, r: measure(with_radius(n, r), d), exact=True)
    for seed, radius in enumerate((1.0, 0.02, 3000.0)):
        ds = directions(name, options, 100 * seed, jnp.float64)
        for (layout, _), d, result in zip(
            arrays_for(name, options), ds, computed(ds, radius), strict=True
        ):
            for method in ("lmo", *SIZES):
                expected = getattr(naive, method)(name, d, layout, radius, **options)
                np.testing.assert_allclose(result[method], expected, rtol=1e-9, atol=1e-12 * radius)


def measure(norm, d):
    return {"lmo": norm.lmo(d), "gauge": norm.gauge(d), "dual_norm": norm.dual_norm(d)}


@every_variant
@every_kind
def test_the_same_however_it_is_called(kind, name):
    """With and without `jit`, of arrays of JAX's and NumPy's, and in `pmap`."""
    layout, shape = arrays_for(name)[-2]
    d = gaussian(shape, dtype=np.float32)
    norm = make(name, {}, layout, exact=True)
    result = variant(kind, lambda d: measure(norm, d))(d)
    expected = {m: getattr(naive, m)(name, d, layout) for m in ("lmo", *SIZES)}
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-5)


@every_norm
@given(data=st.data(), seed=seeds, radius=radii, exponent=st.integers(-30, 30))
def test_feasibility_attainment_duality_and_scale(name, options, data, seed, radius, exponent):
    """The LMO does not see the scale; |⟨d, x⟩| ≤ ‖d‖_* ‖x‖, with equality at the LMO."""
    layout, shape = data.draw(st.sampled_from(arrays_for(name, options)))
    d = gaussian(shape, seed)
    d = np.where(np.abs(d) < 0.1, 0.1, np.clip(d, -3, 3))  # so that none vanishes when scaled
    compute = measured(make(name, options, layout))
    result = compute(jnp.asarray(d, jnp.float32), radius)
    assert float(result["gauge of lmo"]) <= 1 + 1e-5
    least = 0.8 if name in ITERATED else 1 - 1e-5
    assert least <= float(result["pairing"] / result["dual_norm"]) <= 1 + 1e-5
    scaled = compute(jnp.asarray(-(10.0**exponent) * d, jnp.float32), radius)
    np.testing.assert_allclose(
        scaled["lmo"] / radius, -result["lmo"] / radius, rtol=1e-4, atol=1e-4
    )
    if name not in ITERATED or abs(exponent) < 10:
        for size in SIZES:
            np.testing.assert_allclose(scaled[size], result[size] * 10.0**exponent, rtol=1e-4)
    # With a batch the gauge is a maximum and the dual norm a sum, so the inequality still holds.
    other = gaussian(shape, seed + 1, np.float32)
    bound = result["dual_norm"] * compute(other, radius)["gauge"]
    assert abs(float(np.vdot(d, other))) <= float(bound) * (1 + 1e-4)


def test_feasibility_by_default():
    """In bfloat16, and on a CPU without it at least as good."""
    norms = [Spectral(layout=layout) for layout, _ in ARRAYS]
    lmos = jax.jit(lambda ds: [norm.lmo(d) for norm, d in zip(norms, ds, strict=True)])
    for seed in range(4):
        ds = directions("Spectral", {}, seed)
        for (layout, _), d, v in zip(ARRAYS, ds, lmos(ds), strict=True):
            assert naive.gauge("Spectral", v, layout) <= 1.005
            assert float(jnp.vdot(d, v)) >= 0.8 * naive.dual_norm("Spectral", d, layout)


@every_norm
def test_narrow_arrays_at_any_scale(name, options):
    """What comes of them is what comes of the same numbers in float32."""
    layout, shape = arrays_for(name, options)[-2]
    d = gaussian(shape)
    d = np.where(np.abs(d) < 0.1, 0.1, np.clip(d, -3, 3))
    compute = measured(make(name, options, layout))
    for dtype, factors, tolerance in (
        (jnp.float16, (1e-3, 1e-2, 1.0, 30.0, 1e4), 2e-3),
        (jnp.bfloat16, (1e-30, 1.0), 2**-7),
    ):
        for factor in factors:
            scaled = jnp.asarray(d * factor, dtype)
            result = compute(scaled, 1.0)
            assert result["lmo"].dtype == dtype
            assert result["gauge"].dtype == result["dual_norm"].dtype == jnp.float32
            assert float(result["gauge of lmo"]) <= 1 + tolerance
            rounded = jnp.asarray(np.asarray(scaled, np.float64) / factor, jnp.float32)
            expected = compute(rounded, 1.0)["lmo"]
            found = result["lmo"].astype(jnp.float32)
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=2e-3)


@every_norm
def test_zero_gives_zero(x64, name, options):
    shapes = [arrays_for(name, options)[0], *EMPTY]
    norms = [make(name, options, layout) for layout, _ in shapes]
    dtypes = ("float16", "bfloat16", "float32", "float64")
    zeros = [[jnp.zeros(shape, dtype) for _, shape in shapes] for dtype in dtypes]

    def compute(zeros):
        measures = [measure(norm, x) for xs in zeros for norm, x in zip(norms, xs, strict=True)]
        bounds = [gauge_bounds(x, n) for xs in zeros for n, x in zip(norms, xs, strict=True)]
        return [m["lmo"] for m in measures], measures, bounds

    # Options divide by sizes, which may be zero: that shows when they are traced.
    lmos, *rest = jax.eval_shape(compute, zeros) if options else jax.jit(compute)(zeros)
    chex.assert_trees_all_equal_shapes_and_dtypes(lmos, jax.tree.leaves(zeros))
    if not options:
        chex.assert_trees_all_equal((lmos, rest), jax.tree.map(jnp.zeros_like, (lmos, rest)))


@every_kind
def test_layouts_and_batches(name):
    """Axes in another order give the same in that order; a stack is its matrices one by one."""
    for layout, shape in (arrays_for(name)[0], arrays_for(name)[-2]):
        orders = [np.roll(np.arange(len(layout) + 1), turns) for turns in range(len(shape))]
        norms = [
            make(name, {}, "".join(("b" + layout)[axis] for axis in order)) for order in orders
        ]
        stack = jnp.asarray(gaussian((3, *shape)), jnp.float32)
        stacks = [jnp.transpose(stack, order) for order in orders]
        together = jax.jit(lambda xs, norms=norms: list(map(measure, norms, xs)))(stacks)
        alone = [measured(make(name, {}, layout))(d, 1.0) for d in stack]
        lmos = jnp.stack([one["lmo"] for one in alone])
        for order, turned in zip(orders, together, strict=True):
            np.testing.assert_allclose(turned["lmo"], jnp.transpose(lmos, order), atol=1e-4)
            np.testing.assert_allclose(turned["gauge"], max(a["gauge"] for a in alone), rtol=1e-5)
            dual_norm = sum(one["dual_norm"] for one in alone)
            np.testing.assert_allclose(turned["dual_norm"], dual_norm, rtol=1e-5)


@every_norm
def test_nan_and_infinity_stay_visible_and_local(name, options):
    layout = "bsio" if name == "SpectralConv" else "bio"
    clean = gaussian((3, 2, 4, 5) if name == "SpectralConv" else (3, 4, 5), dtype=np.float32)
    for exact in (False, True) if name in ITERATED else (False,):
        norm = make(name, options, layout, exact=exact)
        compute = jax.jit(lambda d, norm=norm: measure(norm, d))
        expected = compute(clean)["lmo"]
        for bad in (np.nan, np.inf, -np.inf):
            spoiled = clean.copy()
            spoiled[(1,) * clean.ndim] = bad
            result = compute(spoiled)
            assert bool(jnp.any(jnp.isnan(result["lmo"][1])))
            np.testing.assert_allclose(result["lmo"][::2], expected[::2], atol=1e-6)
            assert not np.isfinite(result["gauge"])
            assert not np.isfinite(result["dual_norm"])


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(Sign(), (70, 70)), (scion_jax.RowNorm(), (2, 5000)), (scion_jax.ColNorm(), (5000, 2))],
)
def test_nan_among_many_numbers_stays_visible(norm, shape):
    """XLA for CPUs forgets NaN in a maximum over 4,096 entries or more."""
    spoiled = jnp.ones(shape).at[1, 1].set(jnp.nan)
    assert bool(jnp.isnan(norm.gauge(spoiled)))
    assert bool(jnp.isnan(jax.jit(norm.gauge)(spoiled)))
    gradient = jax.grad(norm.gauge)(jnp.ones(shape).at[1, 1].set(2.0))
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert float(gradient[1, 1]) > 0


@pytest.mark.fast
@every_norm
def test_init_is_on_the_ball_or_zero(x64, name, options):
    cases = [(*case, "float64") for case in arrays_for(name, options)[::3]]
    cases += [(*EMPTY[0], "float64"), (*EMPTY[2], "float64")]
    cases += [(*cases[-3][:2], dtype) for dtype in ("float16", "bfloat16", "float32")]
    draw = jax.jit(
        lambda key: {
            (layout, shape, dtype): make(name, options, layout, radius=5.0).init(key, shape, dtype)
            for layout, shape, dtype in cases
        }
    )
    for (layout, shape, dtype), x in draw(jax.random.key(1)).items():
        assert (x.shape, x.dtype) == (shape, jnp.dtype(dtype))
        vector = name == "BiasRMS" or (name == "Auto" and len(layout.replace("b", "")) == 1)
        gauge = naive.gauge(name, x, layout, 5.0, **options) if x.size else 0
        tolerance = max(4 * float(jnp.finfo(dtype).eps), 1e-12)
        np.testing.assert_allclose(gauge, 0 if vector or not x.size else 1, atol=tolerance)


@pytest.mark.fast
@every_closed_form
def test_a_radius_may_be_traced(name, options):
    norm = make(name, options, "io")
    d, radii = jnp.asarray(gaussian((3, 4)), jnp.float32), jnp.array([0.5, 2.0, 50.0])
    mapped = jax.vmap(lambda radius: measure(with_radius(norm, radius), d))(radii)
    for index, radius in enumerate(radii):
        found = jax.tree.map(lambda x, index=index: x[index], mapped)
        chex.assert_trees_all_close(found, measure(with_radius(norm, float(radius)), d), rtol=1e-5)


@pytest.mark.fast
def test_norms_are_values():
    for name in {name for name, _ in NORMS.values()}:
        kind = getattr(scion_jax, name)
        assert kind(50.0) == kind(radius=50.0) != kind(40.0)
        assert len({kind(50.0), kind(50.0), kind(50.0, constrained=False)}) == 2
        assert dataclasses.replace(kind(2.0), radius=3.0) == kind(3.0)
        assert jax.tree.leaves(kind(2.0)) == [kind(2.0)]  # a leaf, not a container
        for attribute in ("radius", "raduis"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(kind(), attribute, 2.0)
        with pytest.raises(TypeError):
            kind(1.0, "io")


def test_every_public_norm_has_its_row():
    public = {n for n, kind in vars(scion_jax).items() if isinstance(kind, type)}
    norms = {n for n in public if issubclass(getattr(scion_jax, n), scion_jax.Norm)} - {"Norm"}
    assert norms | {"Auto"} == {name for name, _ in NORMS.values()}
    assert set(naive.BALLS) | {"Auto"} == norms | {"Auto"}
    assert {len(layout) for layout, _ in ARRAYS} == {2, 4}
