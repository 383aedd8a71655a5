"""The compiled step: one iteration per distinct shape, however many layers there are."""

import re

import jax
import jax.numpy as jnp
import pytest

from scion_jax import Auto, Spectral, scion
from scion_jax.orthogonalize import _newton_schulz

pytestmark = pytest.mark.fast


def lowered(layers):
    """A stack of transformer-like blocks with two distinct matrix shapes, either way round."""
    block = {"q": (16, 16), "o": (16, 16), "up": (16, 64), "down": (64, 16), "bias": (16,)}
    params = {
        f"layer{index}": {name: jnp.ones(shape) for name, shape in block.items()}
        for index in range(layers)
    }
    optimizer = scion(0.1, Auto())
    return jax.jit(optimizer.update).lower(params, optimizer.init(params), params)


@pytest.mark.parametrize("layers", [1, 8])
def test_one_loop_per_shape(layers):
    text = lowered(layers).as_text()
    assert text.count("stablehlo.while") == 2
    assert text.count("stablehlo.dot_general") == 2 * 3


def test_matrix_products_do_not_grow_with_depth():
    counts = [len(re.findall(r" dot\(", lowered(n).compile().as_text())) for n in (2, 8)]
    assert counts[0] == counts[1]


def test_eager_calls_do_not_compile_the_iteration_again():
    d = jnp.ones((5, 7))
    Spectral().lmo(d)
    compiled = _newton_schulz._cache_size()
    Spectral(3.0).lmo(2 * d)
    assert _newton_schulz._cache_size() == compiled
