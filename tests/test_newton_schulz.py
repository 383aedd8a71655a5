"""How the iteration is organized: groups of steps, shifts, and what CPUs want otherwise."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scion_jax import NewtonSchulz, orthogonalize
from scion_jax.polar import cpu
from scion_jax.polar.coefficients import resolve
from scion_jax.polar.newton_schulz import Products, groups, newton_schulz
from scion_jax.polar.spectral_bound import spectral_norm_bound

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("columns", "dtype", "steps", "expected"),
    [
        (64, FLOAT32, 4, [1, 1, 1, 1]),  # square: the Gram matrix is no smaller
        (96, FLOAT32, 4, [1, 1, 1, 1]),
        (256, FLOAT32, 4, [4]),
        (256, FLOAT32, 9, [4, 4, 1]),
        (64, BFLOAT16, 4, [1, 1, 1, 1]),
        (256, BFLOAT16, 4, [2, 1, 1]),  # a group at the end would lift singular values
        (256, BFLOAT16, 2, [2]),
        (256, BFLOAT16, 1, [1]),
    ],
)
def test_groups(columns, dtype, steps, expected):
    assert groups(64, columns, steps, dtype) == expected


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [(2, 16, 24), (2, 16, 64), (1, 768, 800)])
def test_cpus_compute_the_same(dtype, shape):
    """Their blocks of symmetric products too, which start at 384 rows."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    steps = resolve("minimax", None)
    plain = newton_schulz(x, steps, 4, Products(dtype))
    theirs = jax.jit(lambda x: newton_schulz(x, steps, 4, cpu.CpuProducts(dtype)))(x)
    tolerance = 2e-5 if dtype == FLOAT32 else 2e-2
    np.testing.assert_allclose(theirs, plain, atol=tolerance, equal_nan=False)


def test_symmetric_products_of_large_matrices_take_fewer_operations():
    def work(products):
        cost = jax.jit(products.gram).lower(jnp.ones((1, 768, 64))).compile().cost_analysis()
        return cost["flops"]

    assert work(cpu.CpuProducts(FLOAT32)) < 0.7 * work(Products(FLOAT32))


@pytest.mark.parametrize(
    ("rows", "halves"),
    [(768, [384, 192]), (384, [192]), (382, []), (387, []), (774, [387])],
)
def test_where_symmetric_products_are_divided(rows, halves):
    """In two equal parts, down to 192 rows."""
    products = cpu.CpuProducts(FLOAT32)
    x, symmetric = (jax.ShapeDtypeStruct((3, rows, n), jnp.float32) for n in (8, rows))
    for text in (
        str(jax.make_jaxpr(products.gram)(x)),
        str(jax.make_jaxpr(products.commuting)(symmetric, symmetric)),
    ):
        plain = re.findall(r"f32\[\d+,(\d+),\d+\] = dot_general", text)
        assert list(map(int, plain)) == [*halves, halves[-1] if halves else rows]


def test_dtypes_of_products():
    def lowered(dtype):
        x = jnp.ones((1, 4, 6), jnp.float32)
        return jax.jit(Products(dtype).gram).lower(x).as_text()

    assert "-> tensor<1x4x4xf32>" in lowered(BFLOAT16)  # sums are not rounded
    assert "HIGHEST" in lowered(FLOAT32)


def test_shifts_of_zero_take_no_time():
    """In float32 nothing is added to a wide matrix; only products, and divisions by norms."""

    def additions(dtype):
        def iterate(x):
            return newton_schulz(x, resolve("minimax", None), 4, Products(dtype))

        return str(jax.make_jaxpr(iterate)(jnp.ones((2, 8, 32)))).count("f32[2,8,32] = add")

    assert (additions(FLOAT32), additions(BFLOAT16)) == (0, 3)


@pytest.mark.parametrize("shape", [(8, 48, 48), (8, 9, 40)])
def test_shifts_spare_bfloat16_most_of_its_rounding(shape):
    """Without any, or with others, singular values rise to 1.002 and more."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    iterate = jax.jit(lambda x: newton_schulz(x, resolve("minimax", None), 4, Products(BFLOAT16)))
    assert np.linalg.norm(iterate(x), 2, axis=(1, 2)).max() <= 1.0013


def test_choices_are_made_late(x64):
    """Neither steps nor norm of one set survive in another."""
    method = dataclasses.replace(NewtonSchulz(), coefficients="quintic")
    assert method == NewtonSchulz("quintic")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)))
    sigma = np.linalg.svd(x, compute_uv=False) / np.linalg.norm(x)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.775 * sigma**3 + 2.0315 * sigma**5
    result = np.linalg.svd(orthogonalize(x, method), compute_uv=False)
    np.testing.assert_allclose(np.sort(result), np.sort(sigma), atol=1e-12)


@pytest.mark.parametrize(
    ("compute", "given", "expected"),
    [
        (None, jnp.float32, jnp.bfloat16),
        (None, jnp.float16, jnp.bfloat16),
        (None, jnp.float64, jnp.float64),
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float32),  # float16 would overflow
        (jnp.bfloat16, jnp.float64, jnp.float64),
    ],
)
def test_communication_dtype(x64, compute, given, expected):
    assert NewtonSchulz(compute_dtype=compute).communication_dtype(given) == expected


def test_processors(tmp_path, monkeypatch):
    look = functools.partial(cpu._flags.__wrapped__)
    described = tmp_path / "cpuinfo"
    assert not look(described)  # no such file, as on other systems
    described.write_text("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n")
    assert "avx512_bf16" in look(described)
    for fast in (True, False):
        monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda fast=fast: fast)
        assert cpu.default_dtype(BFLOAT16) == (BFLOAT16 if fast else FLOAT32)


@pytest.mark.parametrize(
    ("compute", "fast", "expected"),
    [(None, False, "f32"), (None, True, "bf16"), (BFLOAT16, False, "bf16")],
)
def test_cpus_that_are_slow_in_bfloat16_take_float32_unless_told(
    compute, fast, expected, monkeypatch
):
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: fast)
    method = NewtonSchulz(compute_dtype=compute, chunk_bytes=12345)  # that nothing has traced yet
    text = jax.jit(lambda x: orthogonalize(x, method)).lower(jnp.ones((3 + fast, 5))).as_text()
    factors = re.findall(r"dot_general.*\(tensor<[\dx]*(b?f\d+)>, tensor<[\dx]*(b?f\d+)>\)", text)
    assert set(factors) == {(expected, expected)}


def test_each_platform_gets_its_own():
    """Chosen when lowered: nothing of the CPU's is in a TPU's program."""
    x = jax.ShapeDtypeStruct((2, 32, 64), jnp.float32)

    def lowered(method, platform):
        traced = jax.jit(lambda x: orthogonalize(x, method)).trace(x)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    cpus, tpus = lowered(NewtonSchulz(chunk_bytes=1), "cpu"), lowered(NewtonSchulz(), "tpu")
    assert "stablehlo.while" in cpus
    assert "stablehlo.while" not in tpus
    assert tpus.count("stablehlo.dot_general") == 7 + 3 + 3  # of a pair of steps, and of two
    # In float32 a loop around the steps after the first, where they are groups of one.
    method = NewtonSchulz(compute_dtype=jnp.float32)
    x = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
    assert lowered(method, "tpu").count("stablehlo.while") == 1


@pytest.mark.parametrize(("platform", "chunk", "whole"), [("cpu", 2, 16), ("tpu", 256, 1024)])
@pytest.mark.parametrize("bounds", [False, True])
def test_sizes_of_chunks(platform, chunk, whole, bounds):
    """2 MiB and 256 MiB, here of matrices of 1 MiB."""
    method = NewtonSchulz(compute_dtype=jnp.float32)
    function = spectral_norm_bound if bounds else lambda x: orthogonalize(x, method)

    def batches(count):
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct((count, 128, 2048), jnp.float32))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return set(re.findall(r"dot_general.*-> tensor<(\d+)x", text))

    assert batches(chunk) == batches(whole) == {str(chunk)}


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
        result = jax.jit(transposed)(x)
        np.testing.assert_allclose(result, expected, atol=0.02, equal_nan=False)
