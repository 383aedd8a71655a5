"""Orthogonalizers: what comes out of the iteration, in every dtype, and how it is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scion_jax import ExactPolar, NewtonSchulz, orthogonalize
from scion_jax.distributed.bucketing import map_stacks, measure_stacks
from scion_jax.polar.orthogonalizers import orthogonalize_stacks

pytestmark = pytest.mark.fast

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (8, 8), (24, 6), (16, 64), (3, 10, 4), (0, 3, 4)]


def with_spectrum(sigma, columns, seed=0):
    rng = np.random.default_rng(seed)
    n = len(sigma)
    u, _ = np.linalg.qr(rng.standard_normal((n, n)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, n)))
    return (u * sigma) @ v.T


def polynomial(orthogonalizer, sigma):
    rows = NewtonSchulz(orthogonalizer.coefficients, orthogonalizer.steps)
    from scion_jax.polar.coefficients import resolve

    for a, b, c in resolve(rows.coefficients, rows.steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [NewtonSchulz(), NewtonSchulz("quintic"), ExactPolar()])
def test_shape_and_dtype_are_kept(shape, method):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        result = orthogonalize(jnp.ones(shape, dtype), method)
        assert (result.shape, result.dtype) == (shape, dtype)
        assert bool(jnp.all(jnp.isfinite(result)))


@pytest.mark.parametrize(
    "method",
    [
        NewtonSchulz(),
        NewtonSchulz(steps=3),
        NewtonSchulz("quintic"),
        NewtonSchulz(schatten=2),
        NewtonSchulz("polar_express", 6),
        NewtonSchulz("quintic", schatten=4),
        NewtonSchulz([(1.5, -0.5, 0.0)] * 4),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 9), (1, 6), (4, 24)])
def test_iteration_applies_its_polynomial_to_the_singular_values(x64, method, rows, columns):
    sigma = np.sort(np.random.default_rng(1).uniform(0.1, 2.0, rows))[::-1]
    matrix = with_spectrum(sigma, columns)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    expected = (u * polynomial(method, sigma / np.linalg.norm(sigma, method.schatten))) @ vt
    for given, wanted in ((matrix, expected), (matrix.T, expected.T)):
        np.testing.assert_allclose(orthogonalize(jnp.asarray(given), method), wanted, atol=1e-12)


def test_exact_polar(x64):
    matrix = with_spectrum(np.array([3.0, 1.0, 1e-9, 0.0]), 6)
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(
        orthogonalize(jnp.asarray(matrix), ExactPolar()), u[:, :3] @ vt[:3], atol=1e-6
    )


@pytest.mark.parametrize(
    ("dtype", "excess", "value"),
    [(jnp.float32, 1e-5, 0.96), (jnp.bfloat16, 1e-2, 0.95), (jnp.float16, 1e-2, 0.95)],
)
@pytest.mark.parametrize("kind", ["gaussian", "decaying", "rank one", "equal", "deficient"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 9), (2, 2), (16, 16), (48, 48), (32, 128)])
def test_default_is_feasible_in_every_compute_dtype(dtype, excess, value, kind, rows, columns):
    j = np.arange(rows)
    sigma = {
        "decaying": 10.0 ** (-6 * j / rows),
        "rank one": (j == 0) * 1.0,
        "equal": np.ones(rows),
        "deficient": (j < (rows + 1) // 2) * 1.0,
    }
    rng = np.random.default_rng(rows + columns)
    for seed in range(4):
        matrix = (
            rng.standard_normal((rows, columns))
            if kind == "gaussian"
            else with_spectrum(sigma[kind], columns, seed)
        )
        v = orthogonalize(jnp.asarray(matrix, jnp.float32), NewtonSchulz(compute_dtype=dtype))
        assert np.linalg.norm(v, 2) <= 1 + excess
        assert np.sum(matrix * v) >= value * np.linalg.norm(matrix, "nuc")


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


def test_stacks_are_the_matrices_one_by_one():
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 8), (1, 8, 3), (4, 3, 3), (3, 8, 3), (0, 3, 8), (1, 3, 0)]
    batches = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    together = orthogonalize_stacks(batches, NewtonSchulz())
    for batch, result in zip(batches, together, strict=True):
        (alone,) = orthogonalize_stacks([batch], NewtonSchulz())
        np.testing.assert_allclose(result, alone, atol=1e-5)


def test_one_call_per_shape_and_dtype():
    seen = []

    def record(stack):
        seen.append((*(part if part is None else part.shape for part in stack), stack.dtype))
        return stack

    batches = [
        jnp.ones((1, 2, 3)),
        jnp.ones((5, 3, 2)),
        jnp.ones((1, 4, 4)),
        jnp.ones((1, 2, 3), jnp.bfloat16),
        jnp.ones((2, 2, 3)),
    ]
    results = map_stacks(record, batches, 2**20)
    assert seen == [
        ((3, 2, 3), (5, 3, 2), jnp.float32),
        ((1, 4, 4), None, jnp.float32),
        ((1, 2, 3), None, jnp.bfloat16),
    ]
    assert [r.shape for r in results] == [b.shape for b in batches]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("sizes", [(1, 0), (7, 0), (4, 4), (5, 2), (0, 6), (1, 9)])
def test_chunks_are_the_whole(sizes, chunk):
    """Every matrix goes through once, whichever way the stack is cut, and none is lost."""
    rng = np.random.default_rng(0)
    wide = [jnp.asarray(rng.standard_normal((1, 2, 3)), jnp.float32) for _ in range(sizes[0])]
    tall = [jnp.asarray(rng.standard_normal((1, 3, 2)), jnp.float32) for _ in range(sizes[1])]
    largest = []

    def double(stack):
        largest.append(sum(stack.sizes))
        return stack.map(lambda part: 2 * part)

    results = map_stacks(double, wide + tall, chunk * 6 * 4)
    for given, result in zip(wide + tall, results, strict=True):
        np.testing.assert_array_equal(result, 2 * given)
    assert len(largest) == 1  # traced once
    assert largest[0] <= 3 * chunk


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_leaf_by_leaf_and_order_make_no_difference(dtype):
    rng = np.random.default_rng(0)
    shapes = [(1, 8, 24), (1, 24, 8), (3, 8, 8), (1, 8, 24), (2, 8, 8), (1, 24, 8), (1, 8, 24)]
    batches = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    whole = NewtonSchulz(compute_dtype=dtype, chunk_bytes=2**30)
    chunked = NewtonSchulz(compute_dtype=dtype, chunk_bytes=1)
    expected = [orthogonalize_stacks([batch], whole)[0] for batch in batches]
    order = rng.permutation(len(batches))
    shuffled = orthogonalize_stacks([batches[index] for index in order], chunked)
    for one, results in (
        (expected, orthogonalize_stacks(batches, whole)),
        (expected, orthogonalize_stacks(batches, chunked)),
        ([expected[index] for index in order], shuffled),
    ):
        for wanted, result in zip(one, results, strict=True):
            np.testing.assert_allclose(result, wanted, atol=1e-5 if dtype == jnp.float32 else 2e-2)


def test_one_number_per_matrix():
    rng = np.random.default_rng(0)
    shapes = [(2, 3, 2), (1, 2, 3), (4, 2, 2), (3, 3, 2)]
    batches = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]

    def largest(stack):
        return jnp.concatenate([part.max(axis=(1, 2)) for part in stack.parts])

    for batch, numbers in zip(batches, measure_stacks(largest, batches), strict=True):
        np.testing.assert_array_equal(numbers, batch.max(axis=(1, 2)))


def test_under_vmap_and_grad_free_tracing():
    stack = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 6)), jnp.float32)
    mapped = jax.jit(jax.vmap(orthogonalize))(stack)
    np.testing.assert_allclose(mapped, orthogonalize(stack), atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="needs matrices"):
        orthogonalize(jnp.ones(3))
    with pytest.raises(TypeError, match="floating dtype"):
        orthogonalize(jnp.ones((2, 2), jnp.int32))
