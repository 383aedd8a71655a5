"""How the iteration is organized: groups of steps, centred matrices, and what hardware decides."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scion_jax import NewtonSchulz, hardware, orthogonalize
from scion_jax.polar.arithmetic import Arithmetic
from scion_jax.polar.centred import Centred
from scion_jax.polar.coefficients import resolve
from scion_jax.polar.newton_schulz import flops, groups
from scion_jax.polar.stack import Stack

pytestmark = pytest.mark.fast

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def symmetric(rng, n, mean, spread):
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return (q * (mean + spread * rng.standard_normal(n))) @ q.T


def matrix(centred):
    return centred.rest + centred.mean * np.eye(centred.rest.shape[1], dtype=centred.rest.dtype)


@pytest.mark.parametrize(
    ("columns", "dtype", "expected"),
    [
        (64, FLOAT32, (1, 1, 1, 1)),  # square: the Gram matrix is no smaller
        (256, FLOAT32, (4,)),
        (64, BFLOAT16, (1, 1, 1, 1)),
        (256, BFLOAT16, (1, 1, 2)),  # its rounding would be amplified too much before
    ],
)
def test_groups_of_the_default(columns, dtype, expected):
    assert groups(64, columns, resolve("minimax", None), dtype) == expected


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, jnp.dtype(jnp.float16)])
@pytest.mark.parametrize("columns", [64, 96, 160, 1024])
def test_groups_are_the_cheapest_that_rounding_allows(columns, dtype):
    steps = resolve("minimax", 6)
    best = groups(64, columns, steps, dtype)
    assert sum(best) == 6

    def amplified(division):
        starts = itertools.accumulate(division, initial=0)
        pieces = [steps[a : a + k] for a, k in zip(starts, division, strict=False)]
        return max(
            np.prod([row[0] ** 2 for row in piece[:-1]]) * (len(piece) > 1) for piece in pieces
        ) * float(jnp.finfo(dtype).eps)

    def work(division):
        n, m = 64, columns
        return sum(2 * n * n * (m + (4 * k - 3) * n + m) for k in division)

    every = [
        tuple(len(list(run)) for _, run in itertools.groupby(itertools.accumulate(cuts)))
        for cuts in itertools.product([0, 1], repeat=6)
        if cuts[0] == 0
    ]
    allowed = [division for division in every if amplified(division) <= 0.06]
    assert best in allowed
    assert work(best) == min(map(work, allowed)) == flops(64, columns, steps, dtype)


def test_centred_products(x64):
    rng = np.random.default_rng(0)
    double = Arithmetic(jnp.dtype(jnp.float64), jnp.dtype(jnp.float64))
    x = np.stack([symmetric(rng, 5, 2.0, 0.3), symmetric(rng, 5, 0.0, 1.0)])
    centred = Centred.of(jnp.zeros((2, 1, 1)), jnp.asarray(x))
    np.testing.assert_allclose(matrix(centred), x, atol=1e-14)
    np.testing.assert_allclose(jnp.trace(centred.rest, axis1=1, axis2=2), 0, atol=1e-14)
    steps = (jnp.float64(number) for number in (2.0, -3.0, 0.5))
    polynomial = centred.polynomial(*steps, double)
    expected = 2 * np.eye(5) - 3 * x + 0.5 * x @ x
    np.testing.assert_allclose(matrix(polynomial), expected, atol=1e-13)
    product = polynomial.commuting_product(centred, double)
    np.testing.assert_allclose(matrix(product), expected @ x, atol=1e-13)
    wide, tall = rng.standard_normal((1, 5, 7)), rng.standard_normal((1, 7, 5))
    for rounds in (jnp.float64, jnp.float16):
        result = centred.times(
            Stack(jnp.asarray(wide), jnp.asarray(tall)), Arithmetic(jnp.dtype(rounds), double.wide)
        )
        tolerance = 1e-13 if rounds == jnp.float64 else 1e-2
        np.testing.assert_allclose(result.wide, x[:1] @ wide, atol=tolerance)
        np.testing.assert_allclose(result.tall, tall @ x[1:], atol=tolerance)


def test_centring_spares_close_eigenvalues_from_rounding():
    """A polynomial that presses 1 down to 0.02 has terms of 20, which bfloat16 rounds by 0.04."""
    coarse = Arithmetic(BFLOAT16, FLOAT32)
    x = symmetric(np.random.default_rng(0), 6, 0.9, 1e-3)
    centred = Centred.of(jnp.zeros((1, 1, 1)), jnp.asarray(x[None], jnp.float32))
    steps = (jnp.float32(number) for number in (8.0, -22.0, 16.0))
    result = matrix(centred.polynomial(*steps, coarse))[0]
    expected = 8 * np.eye(6) - 22 * x + 16 * x @ x
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_default_dtype_follows_the_hardware(monkeypatch):
    def narrow(dtype, fast):
        monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda: fast)
        return NewtonSchulz().arithmetic(dtype).narrow

    assert narrow(jnp.float32, fast=True) == jnp.bfloat16
    assert narrow(jnp.float32, fast=False) == jnp.float32
    assert narrow(jnp.float64, fast=True) == jnp.float64
    assert NewtonSchulz(compute_dtype=jnp.float32).arithmetic(jnp.float32).narrow == jnp.float32


def test_flags_of_the_processor(tmp_path, monkeypatch):
    # conftest replaces the function; here is the original.
    hardware = importlib.util.module_from_spec(importlib.util.find_spec("scion_jax.polar.hardware"))
    hardware.__spec__.loader.exec_module(hardware)
    described = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_CPU_DESCRIPTION", described)
    monkeypatch.setattr(hardware.jax, "default_backend", lambda: "cpu")
    assert not hardware.multiplies_bfloat16()  # no such file, as on other systems
    hardware._cpu_flags.cache_clear()
    described.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n")
    assert hardware.multiplies_bfloat16()
    hardware._cpu_flags.cache_clear()
    described.write_text("processor\t: 0\nflags\t\t: fpu avx2\n")
    assert not hardware.multiplies_bfloat16()
    monkeypatch.setattr(hardware.jax, "default_backend", lambda: "gpu")
    assert hardware.multiplies_bfloat16()


@pytest.mark.parametrize("shape", [(96, 32), (64, 64), (3, 32, 96)])
def test_transposed_arguments_in_bfloat16(shape):
    """XLA for CPUs must not fold a transpose into a product that it has no kernel for."""
    method = NewtonSchulz(compute_dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    expected = orthogonalize(x, method)
    for transposed in (
        lambda x: orthogonalize(x.mT, method).mT,
        lambda x: orthogonalize(jnp.tanh(x.mT / 100), method).mT,
    ):
        np.testing.assert_allclose(jax.jit(transposed)(x), expected, atol=0.02)
    np.testing.assert_allclose(
        jax.jit(lambda: orthogonalize(jnp.eye(*shape[-2:]).T, method))(),
        np.eye(*shape[-2:]).T,
        atol=0.04,
    )
