"""The compiled step: one iteration per distinct shape, however many layers there are."""

import re

import jax
import jax.numpy as jnp
import pytest

from scion_jax import Auto, NewtonSchulz, Spectral, scion
from scion_jax.polar.orthogonalizers import _newton_schulz

pytestmark = pytest.mark.fast


def lowered(layers, dtype):
    """A stack of transformer-like blocks with two distinct matrix shapes, either way round."""
    block = {"q": (16, 16), "o": (16, 16), "up": (16, 64), "down": (64, 16), "bias": (16,)}
    params = {
        f"layer{index}": {name: jnp.ones(shape) for name, shape in block.items()}
        for index in range(layers)
    }
    optimizer = scion(0.1, Auto(orthogonalizer=NewtonSchulz(compute_dtype=dtype)))
    return jax.jit(optimizer.update).lower(params, optimizer.init(params), params)


@pytest.mark.parametrize(
    ("dtype", "square", "rectangular"),
    [
        # X Xᵀ, four steps on it, and times X; square ones in a loop after the first step
        (jnp.float32, 3 + 3, 1 + (4 * 4 - 3) + 1),
        (jnp.bfloat16, 4 * 3, (1 + 5 + 1) + 3 + 3),  # two steps on it, then one by one
    ],
)
def test_products_do_not_grow_with_depth(dtype, square, rectangular):
    for layers in (1, 8):
        text = lowered(layers, dtype).as_text()
        assert text.count("stablehlo.dot_general") == square + rectangular
    compiled = [len(re.findall(r" dot\(", lowered(n, dtype).compile().as_text())) for n in (2, 8)]
    assert compiled[0] == compiled[1]


def test_nothing_is_padded_on_one_device():
    for count in (1, 3):
        d = jnp.ones((count, 16, 32))
        text = jax.jit(Spectral(layout="bio").lmo).lower(d).as_text()
        assert f"tensor<{count}x16x32xf32>" in text
        assert f"tensor<{count + 1}x" not in text


def test_long_stacks_go_through_a_loop():
    """Chunks bound temporary memory, and are traced once however many there are."""
    method = NewtonSchulz(chunk_bytes=2 * 32 * 32 * 4)
    optimizer = scion(0.1, Auto(orthogonalizer=method))

    def plan(layers):
        params = {str(index): jnp.ones((32, 32)) for index in range(layers)}
        step = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
        memory = step.compile().memory_analysis()
        return step.as_text().count("stablehlo.dot_general"), memory.temp_size_in_bytes

    (products, temporaries), (same_products, more_temporaries) = plan(8), plan(32)
    assert products == same_products
    updates = (32 - 8) * 32 * 32 * 4
    assert more_temporaries - temporaries <= 2.6 * updates


def test_eager_calls_do_not_compile_the_iteration_again():
    d = jnp.ones((5, 7))
    Spectral().lmo(d)
    compiled = _newton_schulz._cache_size()
    Spectral(3.0).lmo(2 * d)
    assert _newton_schulz._cache_size() == compiled
