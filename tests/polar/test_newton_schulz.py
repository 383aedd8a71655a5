"""How the iteration is organized: groups of steps, shifts, and what CPUs want otherwise."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scion_jax import NewtonSchulz, Spectral, gauge_bounds, orthogonalize
from scion_jax.polar import _cpu as cpu
from scion_jax.polar import _newton_schulz as iteration
from scion_jax.polar._coefficients import steps_of
from scion_jax.polar._newton_schulz import Products, groups, newton_schulz
from scion_jax.polar._pieces import cut, is_tall, joined
from tests.support.norms import gaussian

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
every_dtype = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])


class PlainProducts(Products):
    """Those of accelerators; but XLA for CPUs gets the sum of a product wrong (JAX 0.12)."""

    magnitude = cpu.CpuProducts.magnitude


def iterate(products):
    steps = steps_of("minimax", None)
    return lambda x: newton_schulz(x[None, None], steps, 4, products)[0, 0]


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def lowered(function, x, platform="cpu"):
    return jax.jit(function).trace(x).lower(lowering_platforms=(platform,)).as_text()


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


@every_dtype
@pytest.mark.parametrize("sizes", [(2, 16, 24), (2, 16, 64), (1, 768, 800)])
def test_cpus_compute_the_same(dtype, sizes):
    """Their blocks of symmetric products too, which start at 384 rows."""
    x = gaussian(sizes, dtype=np.float32)
    plain = jax.jit(iterate(PlainProducts(dtype)))(x)
    theirs = jax.jit(iterate(cpu.CpuProducts(dtype)))(x)
    tolerance = 2e-5 if dtype == FLOAT32 else 2e-2
    np.testing.assert_allclose(theirs, plain, atol=tolerance, equal_nan=False)


def test_large_matrices_one_by_one(monkeypatch):
    """The same, derivatives too; a NaN stays in its own matrix. Theirs is a lower limit here."""
    x = jnp.asarray(gaussian((3, 16, 40), dtype=np.float32)).at[1, 0, 0].set(jnp.nan)

    def both(x):
        result, pull = jax.vjp(iterate(PlainProducts(FLOAT32)), x)
        return result, *pull(jnp.sin(result))

    stacked = both(x)
    assert "while" not in lowered(iterate(PlainProducts(FLOAT32)), x)
    monkeypatch.setattr(iteration, "_LARGE", x[0].nbytes)
    assert "while" in lowered(iterate(PlainProducts(FLOAT32)), x)
    batched = jax.vmap(iterate(PlainProducts(FLOAT32)))(x[:, None])
    np.testing.assert_allclose(batched[::2, 0], stacked[0][::2], atol=1e-5)
    for one, other in zip(jax.jit(both)(x), stacked, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.isnan(one[1]).all()
        assert np.isfinite(one[::2]).all()


@pytest.mark.parametrize(
    ("sizes", "dtype", "places"),
    [
        ((4096, 8192), BFLOAT16, [(1, 1, 4096, 8192), (1, 4096, 4096)]),  # 64 MiB
        ((8192, 4096), BFLOAT16, [(1, 4096, 4096)]),  # tall ones within their products
        ((4096, 8184), BFLOAT16, [(1, 1, 4096, 8184)] * 4),  # after every step
        ((768, 3072), BFLOAT16, [(1, 1, 768, 3072)] * 3),
        ((768, 3072), FLOAT32, []),  # nothing is rounded
    ],
)
def test_what_is_rounded_at_once(sizes, dtype, places):
    """Where compilers are held to it; elsewhere they round within products."""
    program = jax.make_jaxpr(iterate(Products(dtype, sizes[0] > sizes[1])))
    x = jax.ShapeDtypeStruct((1, *sizes), jnp.bfloat16 if dtype == BFLOAT16 else jnp.float32)
    found = re.findall(r":bf16\[([\d,]+)\] = optimization_barrier", str(program(x)))
    assert [tuple(map(int, shape.split(","))) for shape in found] == places


@pytest.mark.parametrize(
    ("rows", "halves"), [(768, [384, 192]), (384, [192]), (382, []), (387, []), (774, [387])]
)
def test_where_symmetric_products_are_divided(rows, halves):
    """In two equal parts, down to 192 rows; so they take fewer operations."""
    products, symmetric = cpu.CpuProducts(FLOAT32), shape(3, rows, rows)
    for jaxpr in (
        jax.make_jaxpr(products.gram)(shape(1, 3, rows, 8)),
        jax.make_jaxpr(products.commuting)(symmetric, symmetric),
    ):
        plain = re.findall(r"f32\[\d+,(\d+),\d+\] = dot_general", str(jaxpr))
        assert list(map(int, plain)) == [*halves, halves[-1] if halves else rows]
    if rows == 768:
        work = [
            jax.jit(p.gram).lower(shape(1, 1, rows, 832)).compile().cost_analysis()["flops"]
            for p in (products, Products(FLOAT32))
        ]
        assert work[0] < 0.7 * work[1]


@pytest.mark.parametrize("matrices", [1, 2, 3, 7, 8])
def test_chunks_are_the_whole(matrices):
    """However many go through at a time, whether or not they divide."""
    stack = gaussian((7, 3, 5), dtype=np.float32)
    for function, expected in (
        (lambda x: 2 * x, 2 * stack),
        (lambda x: jnp.sum(x, (1, 2), keepdims=True), stack.sum((1, 2), keepdims=True)),
    ):
        found = cpu.in_chunks(function, jnp.asarray(stack), matrices * stack[0].nbytes)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dtypes_of_products():
    bfloat16 = lowered(Products(BFLOAT16).gram, shape(1, 1, 4, 6))
    assert "-> tensor<1x4x4xf32>" in bfloat16  # sums are not rounded
    assert "HIGHEST" in lowered(Products(FLOAT32).gram, shape(1, 1, 4, 6))


@pytest.mark.parametrize(("dtype", "additions"), [(FLOAT32, 0), (BFLOAT16, 3)])
def test_shifts_of_zero_take_no_time(dtype, additions):
    """In float32 nothing is added to a wide matrix; only products, and divisions by norms."""
    text = str(jax.make_jaxpr(iterate(Products(dtype)))(shape(2, 32, 128)))
    assert text.count("f32[1,2,32,128] = add") == additions


@pytest.mark.parametrize("sizes", [(8, 48, 48), (8, 9, 40)])
def test_shifts_spare_bfloat16_most_of_its_rounding(sizes):
    """Without any, or with others, singular values rise to 1.002 and more."""
    result = jax.jit(iterate(Products(BFLOAT16)))(gaussian(sizes, dtype=np.float32))
    assert np.linalg.norm(result, 2, axis=(1, 2)).max() <= 1.0013


def test_float16_keeps_its_digits():
    """Scaled by the sum of magnitudes, typical entries of this one would be subnormal."""
    x = gaussian((1, 96, 320), dtype=np.float32)
    results = [jax.jit(iterate(Products(dtype)))(x) for dtype in (jnp.dtype(jnp.float16), FLOAT32)]
    np.testing.assert_allclose(*results, atol=2e-3, equal_nan=False)
    spike = np.zeros((1, 96, 320), np.float32)
    spike[0, 3, 5] = 1e30
    result = jax.jit(iterate(Products(jnp.dtype(jnp.float16))))(spike)
    assert np.isfinite(result).all()
    assert result[0, 3, 5] >= 0.9


def test_choices_are_made_late(x64):
    """Neither steps nor norm of one set survive in another."""
    method = dataclasses.replace(NewtonSchulz(), coefficients="quintic")
    assert method == NewtonSchulz("quintic")
    x = gaussian((5, 8))
    sigma = np.linalg.svd(x, compute_uv=False) / np.linalg.norm(x)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.775 * sigma**3 + 2.0315 * sigma**5
    result = np.linalg.svd(orthogonalize(jnp.asarray(x), method), compute_uv=False)
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
def test_input_dtype(x64, compute, given, expected):
    assert NewtonSchulz(compute_dtype=compute).input_dtype(given) == expected


@pytest.mark.parametrize(
    ("compute", "expected"), [(None, "f32"), (BFLOAT16, "bf16"), (FLOAT32, "f32")]
)
def test_cpus_take_float32_unless_told(compute, expected):
    """Whichever machine traces the program."""
    method = NewtonSchulz("quintic", 3, compute_dtype=compute)
    text = lowered(lambda x: orthogonalize(x, method), shape(3, 5))
    factors = re.findall(r"dot_general.*\(tensor<[\dx]*(b?f\d+)>, tensor<[\dx]*(b?f\d+)>\)", text)
    assert set(factors) == {(expected, expected)}


def test_each_platform_gets_its_own():
    """Chosen when lowered: nothing of the CPU's is in a TPU's program."""
    x = shape(5, 256, 1024)
    cpus, tpus = (lowered(orthogonalize, x, platform) for platform in ("cpu", "tpu"))
    assert "stablehlo.while" in cpus
    assert "stablehlo.while" not in tpus
    assert tpus.count("stablehlo.dot_general") == 1 + 7 + 3 + 3  # ones, a pair of steps, and two
    # In float32 a loop around the steps after the first, where they are groups of one.
    method = NewtonSchulz(compute_dtype=jnp.float32)
    text = lowered(lambda x: orthogonalize(x, method), shape(2, 32, 32), "tpu")
    assert text.count("stablehlo.while") == 1


@pytest.mark.parametrize(("platform", "chunk"), [("cpu", 2), ("tpu", 16)])
@pytest.mark.parametrize("bounds", [False, True])
def test_sizes_of_chunks(platform, chunk, bounds):
    """2 MiB on CPUs, here of matrices of 1 MiB; elsewhere all at once."""
    method, norm = NewtonSchulz(compute_dtype=jnp.float32), Spectral(layout="boi")
    function = (lambda x: gauge_bounds(x, norm)) if bounds else lambda x: orthogonalize(x, method)
    for count in (chunk, 16):
        text = lowered(function, shape(count, 128, 2048), platform)
        assert set(re.findall(r"dot_general.*-> tensor<(\d+)x128x128x", text)) == {str(chunk)}


@pytest.mark.parametrize("grid", [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 24), (24, 8)])
def test_pieces_need_not_be_joined(grid, sizes):
    """However matrices are cut, and whichever side is the longer one, the result is the same."""
    rows, columns = sizes
    whole = jnp.asarray(gaussian((3, rows, columns), dtype=np.float32))
    cells = (*grid, 3, rows // grid[0], columns // grid[1])
    products = Products(FLOAT32, tall=is_tall(cells))
    found = newton_schulz(cut(whole, cells), steps_of("minimax", None), 4, products)
    expected = iterate(Products(FLOAT32, tall=rows > columns))(whole)
    np.testing.assert_allclose(joined(found), expected, atol=1e-5, equal_nan=False)
    np.testing.assert_allclose(joined(cut(whole, cells)), whole)
    sums = np.abs(whole).sum((1, 2)) / np.sqrt(rows * columns)
    np.testing.assert_allclose(products.magnitude(cut(whole, cells))[:, 0, 0], sums, rtol=1e-5)


@pytest.mark.parametrize("scale", [2.0**-100, 1e-30, 3.0, 1e30, 2.0**120])
@every_dtype
def test_scales(dtype, scale):
    """Powers of two change nothing, other scales nothing but rounding; there is no epsilon."""
    x = jnp.asarray(gaussian((2, 24, 40), dtype=np.float32)).astype(dtype)
    run = jax.jit(iterate(Products(dtype)))
    result = run(x * jnp.asarray(scale, dtype))
    tolerance = 0 if np.log2(scale).is_integer() else 1e-5 if dtype == FLOAT32 else 2e-2
    np.testing.assert_allclose(result, run(x), atol=tolerance, equal_nan=False)


@pytest.mark.parametrize("sizes", [(96, 32), (64, 64), (3, 32, 96)])
def test_transposed_arguments_in_bfloat16(sizes):
    """XLA for CPUs must not fold a transpose into a product that it has no kernel for."""
    method = NewtonSchulz(compute_dtype=jnp.bfloat16)
    x = jnp.asarray(gaussian(sizes), jnp.float32)
    expected = orthogonalize(x, method)
    for transposed in (
        lambda x: orthogonalize(x.mT, method).mT,
        lambda x: orthogonalize(jnp.tanh(x.mT / 100), method).mT,
    ):
        result = jax.jit(transposed)(x)
        np.testing.assert_allclose(result, expected, atol=0.02, equal_nan=False)


@pytest.mark.skipif(
    "avx512_bf16" not in CPU, reason="XLA widens bfloat16 where the CPU has no products of it"
)
def test_symmetric_products_of_bfloat16_are_not_widened():
    """With a transpose folded into them they would be, which takes twice as long."""
    products, x = cpu.CpuProducts(BFLOAT16), jax.ShapeDtypeStruct((1, 3, 32, 96), jnp.bfloat16)
    text = jax.jit(products.gram).lower(x).compile().as_text()
    whole = r"f32\[(1,)?3,(1,)?32,96\]"
    assert re.search(rf"b{whole.replace('f32', 'f16')}", text)
    assert not re.search(whole, text)
