"""Constrained Scion stays in its balls, by the default orthogonalizer, whatever the gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import scion_jax
from scion_jax import NewtonSchulz, init_params, scion

# name: (norm, radius, options, shape); the matrices have four shapes, each of which is compiled
LEAVES = {
    "wide": ("Spectral", 50.0, {}, (8, 32)),
    "tall": ("Spectral", 3.0, {}, (32, 8)),
    "square": ("Spectral", 1.0, {"max": True}, (16, 16)),
    "thin": ("Spectral", 2.0, {}, (1, 12)),
    "conv": ("SpectralConv", 8.0, {}, (2, 2, 8, 8)),
    "stack": ("Spectral", 50.0, {"layout": "bio"}, (3, 16, 16)),
    "embedding": ("ColNorm", 1.0, {}, (20, 8)),
    "head": ("Sign", 3000.0, {}, (8, 20)),
    "gate": ("RowNorm", 2.0, {}, (8, 4)),
    "bias": ("BiasRMS", 5.0, {}, (16,)),
    "rest": ("Euclidean", 0.1, {}, (5, 5)),
}


def gradients(key):
    """Each Gaussian, or of low rank, or aligned with the last one: what gradients can be like."""
    numbers, tree_of = ravel_pytree(
        {name: jnp.zeros(shape) for name, (*_, shape) in LEAVES.items()}
    )
    one, two = jax.random.split(key)
    drawn = tree_of(jax.random.normal(one, numbers.shape))  # all at once, which compiles sooner
    kinds = dict(zip(LEAVES, jax.random.randint(two, (len(LEAVES),), 0, 3), strict=True))

    def chosen(kind, dense):
        same, ones = [kind == 0, kind == 1], jnp.ones_like(dense)
        return jnp.select(same, [dense, dense[..., :1] * ones], ones)

    return jax.tree.map(chosen, kinds, drawn)


@pytest.mark.parametrize(
    ("compute_dtype", "excess"),
    [pytest.param("float32", 1e-3, marks=pytest.mark.slow), ("bfloat16", 1e-2)],
)
def test_a_thousand_steps_stay_in_the_ball(compute_dtype, excess):
    method, table = NewtonSchulz(compute_dtype=compute_dtype), {}
    for name, (kind, radius, options, _) in LEAVES.items():
        more = {"orthogonalizer": method} if kind.startswith("Spectral") else {}
        table[name] = getattr(scion_jax, kind)(radius, **options, **more)
    labels = {name: name for name in LEAVES}
    optimizer = scion(0.3, table, labels, momentum=0.5)
    shapes = {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, (*_, shape) in LEAVES.items()}

    @jax.jit
    def run(key):
        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(gradients(key), state, params)
            return (optax.apply_updates(params, updates), state), None

        def five_steps(carry, keys):  # looked at after every fifth, since an SVD takes long
            carry, _ = jax.lax.scan(step, carry, keys)
            return carry, {name: table[name].gauge(carry[0][name]) for name in LEAVES}

        params = init_params(key, shapes, table, labels)
        keys = jax.random.split(key, (200, 5))
        return jax.lax.scan(five_steps, (params, optimizer.init(params)), keys)[1]

    for name, gauges in run(jax.random.key(0)).items():
        assert 0.5 <= float(np.max(gauges)) <= 1 + excess, name  # the ball is used
