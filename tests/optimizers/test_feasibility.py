"""Constrained Scion stays in its balls, by the default orthogonalizer, whatever the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import (
    BiasRMS,
    ColNorm,
    Euclidean,
    NewtonSchulz,
    RowNorm,
    Sign,
    Spectral,
    SpectralConv,
    init_params,
    scion,
)

SHAPES = {
    "wide": (8, 32),
    "tall": (32, 8),
    "square": (16, 16),
    "thin": (1, 12),
    "conv": (3, 3, 4, 8),
    "stack": (3, 8, 8),
    "embedding": (20, 8),
    "head": (8, 20),
    "gate": (8, 4),
    "bias": (16,),
    "rest": (5, 5),
}


def norms(compute_dtype):
    method = NewtonSchulz(compute_dtype=compute_dtype)
    return {
        "wide": Spectral(50.0, orthogonalizer=method),
        "tall": Spectral(3.0, orthogonalizer=method),
        "square": Spectral(1.0, max=True, orthogonalizer=method),
        "thin": Spectral(2.0, orthogonalizer=method),
        "conv": SpectralConv(8.0, orthogonalizer=method),
        "stack": Spectral(50.0, layout="bio", orthogonalizer=method),
        "embedding": ColNorm(),
        "head": Sign(3000.0),
        "gate": RowNorm(2.0),
        "bias": BiasRMS(5.0),
        "rest": Euclidean(0.1),
    }


def gradient(key, shape):
    """Gaussian, or of low rank, or aligned with the last one: what gradients can be like."""
    one, two, three = jax.random.split(key, 3)
    dense = jax.random.normal(one, shape)
    rank_one = jax.random.normal(two, (*shape[:-1], 1)) * jnp.ones(shape[-1:])
    kind = jax.random.randint(three, (), 0, 3)
    return jnp.select([kind == 0, kind == 1], [dense, rank_one], jnp.ones(shape))


@pytest.mark.parametrize(
    ("compute_dtype", "excess"),
    [pytest.param(jnp.float32, 1e-3, marks=pytest.mark.slow), (jnp.bfloat16, 1e-2)],
)
def test_a_thousand_steps_stay_in_the_ball(compute_dtype, excess):
    table = norms(compute_dtype)
    labels = {name: name for name in SHAPES}
    optimizer = scion(0.3, table, labels, momentum=0.5)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    params = init_params(jax.random.key(0), shapes, table, labels)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            keys = dict(zip(SHAPES, jax.random.split(key, len(SHAPES)), strict=True))
            gradients = {name: gradient(keys[name], SHAPES[name]) for name in SHAPES}
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), {name: table[name].gauge(params[name]) for name in SHAPES}

        keys = jax.random.split(jax.random.key(1), 1000)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    for name, gauges in run(params).items():
        worst = float(np.max(gauges))
        assert worst <= 1 + excess, (name, worst)
        assert worst >= 0.5, (name, worst)  # the ball is used
