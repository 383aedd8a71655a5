"""Orthogonalizers: what comes out of the iteration, in every dtype, and how it is traced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scion_jax import ExactPolar, NewtonSchulz, Spectral, gauge_bounds, orthogonalize, scale_by_lmo
from scion_jax.polar import Orthogonalizer
from scion_jax.polar._coefficients import steps_of

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (8, 8), (24, 6), (16, 64), (3, 10, 4), (0, 3, 4)]


@functools.cache
def compiled(method):
    return jax.jit(lambda matrix: orthogonalize(matrix, method))


def with_spectrum(sigma, columns, seed=0):
    rng = np.random.default_rng(seed)
    n = len(sigma)
    u, _ = np.linalg.qr(rng.standard_normal((n, n)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, n)))
    return (u * sigma) @ v.T


def polynomial(rows, sigma):
    for a, b, c in rows:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [NewtonSchulz(), NewtonSchulz("quintic"), ExactPolar()])
def test_shape_and_dtype_are_kept(shape, method):
    arrays = [jnp.ones(shape, dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float32)]
    results = jax.jit(lambda arrays: [orthogonalize(array, method) for array in arrays])(arrays)
    for array, result in zip(arrays, results, strict=True):
        assert (result.shape, result.dtype) == (shape, array.dtype)
        assert bool(jnp.all(jnp.isfinite(result)))


@pytest.mark.parametrize(
    ("method", "rows", "schatten"),
    [
        # Defaults are written out: nothing here is read from the code under test.
        (NewtonSchulz(), steps_of("minimax", 4), 4),
        (NewtonSchulz(steps=3), steps_of("minimax", 3), 4),
        (NewtonSchulz("quintic"), [(3.4445, -4.7750, 2.0315)] * 5, 2),
        (NewtonSchulz(schatten=2), steps_of("minimax", 4), 2),
        (NewtonSchulz("polar_express"), steps_of("polar_express", 5), 4),
        (NewtonSchulz("quintic", schatten=4), [(3.4445, -4.7750, 2.0315)] * 5, 4),
        (NewtonSchulz([(1.5, -0.5, 0.0)] * 4), [(1.5, -0.5, 0.0)] * 4, 2),
    ],
)
@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 9), (1, 6), (4, 24)])
def test_iteration_applies_its_polynomial_to_the_singular_values(x64, method, rows, schatten, n, m):
    sigma = np.sort(np.random.default_rng(1).uniform(0.1, 2.0, n))[::-1]
    matrix = with_spectrum(sigma, m)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    expected = (u * polynomial(rows, sigma / np.linalg.norm(sigma, schatten))) @ vt
    for given, wanted in ((matrix, expected), (matrix.T, expected.T)):
        np.testing.assert_allclose(compiled(method)(jnp.asarray(given)), wanted, atol=1e-12)


def test_exact_polar(x64):
    matrix = with_spectrum(np.array([3.0, 1.0, 1e-9, 0.0]), 6)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(
        orthogonalize(jnp.asarray(matrix), ExactPolar()), u[:, :3] @ vt[:3], atol=1e-6
    )


def test_exact_polar_leaves_out_what_vanishes_to_rounding_only():
    """However many matrices there are, and whatever the others are like."""
    stack = np.zeros((100, 16, 16), np.float32)
    stack[:] = np.diag([1.0] * 15 + [1e-5])
    u, v = (np.linalg.qr(g)[0] for g in np.random.default_rng(0).standard_normal((2, 16, 8)))
    stack[0], stack[1], stack[2] = u @ v.T, 0, np.nan
    expected = (stack > 1e-6) * 1.0
    expected[0] = u @ v.T
    polar = orthogonalize(jnp.asarray(stack), ExactPolar())
    others = np.arange(100) != 2
    np.testing.assert_allclose(polar[others], expected[others], atol=1e-5)


def test_exact_polar_is_not_rounded_by_accelerators():
    text = jax.jit(ExactPolar().polar).lower(jnp.ones((1, 2, 3))).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


def test_what_an_orthogonalizer_has_to_define():
    assert Orthogonalizer.__abstractmethods__ == {"polar"}


def test_equal_choices_are_equal():
    """However a dtype is written: equal norms share a stack."""
    methods = {NewtonSchulz(compute_dtype=dtype) for dtype in ("float32", jnp.float32, np.float32)}
    assert len(methods) == 1


SPECTRA = {
    "gaussian": None,
    "decaying": lambda j, n: 10.0 ** (-6 * j / n),
    "power": lambda j, n: (1 + j) ** -0.5,
    "rank one": lambda j, n: (j == 0) * 1.0,
    "equal": lambda j, n: np.ones(n),
    "two values": lambda j, n: np.where(j < n // 2, 1.0, 0.3),
    "deficient": lambda j, n: (j < (n + 1) // 2) * 1.0,
}


@pytest.mark.parametrize(
    ("dtype", "excess", "value"),
    [(jnp.float32, 1e-5, 0.96), (jnp.bfloat16, 5e-3, 0.95), (jnp.float16, 5e-3, 0.95)],
)
@pytest.mark.parametrize("kind", SPECTRA)
def test_default_is_feasible_in_every_compute_dtype(dtype, excess, value, kind):
    compute = compiled(NewtonSchulz(compute_dtype=dtype))
    for n, m in ((1, 9), (2, 2), (2, 8), (9, 40), (16, 16), (48, 48), (32, 128)):
        rng = np.random.default_rng(n + m)
        sigma = None if kind == "gaussian" else SPECTRA[kind](np.arange(n), n)
        matrices = np.stack(
            [
                rng.standard_normal((n, m)) if sigma is None else with_spectrum(sigma, m, seed)
                for seed in range(8)
            ]
        )
        scaled = matrices * 10.0 ** np.arange(-16, 16, 4)[:, None, None]
        results = compute(jnp.asarray(scaled, jnp.float32))
        for matrix, v in zip(matrices, np.asarray(results), strict=True):
            assert np.linalg.norm(v, 2) <= 1 + excess
            # Two or three equal singular values start where the first step presses hardest.
            least = 0.8 if n < 4 and dtype == jnp.bfloat16 else value
            assert np.sum(matrix * v) >= least * np.linalg.norm(matrix, "nuc")


@pytest.mark.parametrize("sizes", [(2, 2), (2, 8), (3, 8), (4, 40), (8, 16), (12, 64)])
def test_few_rows_stay_feasible_in_bfloat16(sizes):
    """Where rounding is not averaged out: pairs of steps would reach 1.2 in one of a hundred."""
    matrices = np.random.default_rng(1).standard_normal((2048, *sizes))
    results = compiled(NewtonSchulz(compute_dtype=jnp.bfloat16))(jnp.asarray(matrices, jnp.float32))
    assert np.linalg.svd(results, compute_uv=False).max() <= 1.005


def test_scale_does_not_matter():
    d = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    expected = orthogonalize(jnp.asarray(d))
    for dtype, scales in (
        (jnp.float32, (1e-30, 1e19, 1e30)),
        (jnp.bfloat16, (1e-30, 1e30)),
        (jnp.float16, (1e-6, 1e4)),
    ):
        for scale in scales:
            for compute in (None, jnp.float16):
                method = NewtonSchulz(compute_dtype=compute)
                result = orthogonalize((jnp.asarray(d) * scale).astype(dtype), method)
                tolerance = 0.1 if scale == 1e-6 else 0.02
                np.testing.assert_allclose(result.astype(np.float32), expected, atol=tolerance)


@pytest.mark.parametrize("method", [NewtonSchulz(), ExactPolar()])
def test_nan_stays_in_its_matrix(method):
    stack = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(np.float32)
    clean = orthogonalize(jnp.asarray(stack), method)
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = stack.copy()
        spoiled[1, 2, 3] = bad
        result = orthogonalize(jnp.asarray(spoiled), method)
        assert bool(jnp.isnan(result[1]).any())
        np.testing.assert_array_equal(result[jnp.array([0, 2, 3])], clean[jnp.array([0, 2, 3])])


def lmos_of(norm, ds):
    lmo = scale_by_lmo(norm)
    return lmo.update(ds, lmo.init(ds))[0]


def test_batches_are_the_matrices_one_by_one(x64):
    """In any order, dtype and shape; one float64 leaf widens no other."""
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 8), (1, 8, 3), (4, 3, 3), (3, 8, 3), (0, 3, 8), (1, 3, 0)]
    kinds = [(jnp.float32, s) for s in shapes]
    kinds += [(d, s) for d in (jnp.float64, jnp.bfloat16, jnp.float16) for s in shapes[:2]]
    batches = [jnp.asarray(rng.standard_normal(s), d) for d, s in kinds]
    norm = Spectral(layout="boi", normalized=False)
    together, bounds = jax.jit(lambda ds: (lmos_of(norm, ds), gauge_bounds(ds, norm)))(batches)
    for index, (batch, result) in enumerate(zip(batches, together, strict=True)):
        bound, scale = bounds[str(index)], np.sqrt(batch.shape[1])
        assert (result.shape, result.dtype) == (batch.shape, batch.dtype)
        assert bound.dtype == (jnp.float64 if batch.dtype == jnp.float64 else jnp.float32)
        alone = scale * compiled(NewtonSchulz())(batch).astype(np.float64)
        tolerance = 1e-12 if batch.dtype == jnp.float64 else 2e-2
        np.testing.assert_allclose(result.astype(np.float64), alone, atol=scale * tolerance)
        if batch.size:
            exact = np.linalg.norm(np.asarray(batch, np.float64), 2, axis=(1, 2)).max()
            assert float(bound) * scale >= exact * (1 - 1e-5)


@dataclasses.dataclass(frozen=True)
class Recording(Orthogonalizer):
    """Somebody's own orthogonalizer, which does nothing but write down what it gets."""

    def polar(self, stack):
        SEEN.append((stack.shape, stack.dtype))
        return stack


SEEN = []


def test_one_call_per_shape_and_dtype():
    """Each way round; what comes out is cut where it was joined."""
    batches = [
        jnp.ones((1, 2, 3)),
        jnp.arange(30.0).reshape(5, 3, 2),
        jnp.ones((1, 4, 4)),
        jnp.ones((1, 2, 3), jnp.bfloat16),
        jnp.arange(12.0).reshape(2, 2, 3),
    ]
    SEEN.clear()
    norm = Spectral(layout="boi", normalized=False, orthogonalizer=Recording())
    results = lmos_of(norm, batches)
    assert sorted(SEEN, key=str) == [
        ((1, 4, 4), jnp.float32),
        ((4, 2, 3), jnp.float32),  # one of bfloat16 among them
        ((5, 3, 2), jnp.float32),
    ]
    for batch, result in zip(batches, results, strict=True):
        expected = np.sqrt(batch.shape[1]) * np.asarray(batch, np.float32)
        np.testing.assert_allclose(result.astype(np.float32), expected, rtol=1e-2)


def test_under_vmap():
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 6)), jnp.float32)
    mapped = jax.jit(jax.vmap(orthogonalize))(stack)
    np.testing.assert_allclose(mapped, orthogonalize(stack), atol=1e-2)
