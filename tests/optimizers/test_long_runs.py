"""Long runs: in 100,000 steps no NaN creeps in, no bound gives way and no average stands still.

All kinds of gradients of one optimizer and dtype run together, under `jax.vmap`: one compilation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from scion_jax import (
    BiasRMS,
    ColNorm,
    NewtonSchulz,
    Sign,
    Spectral,
    average_gradients,
    init_params,
    scion_light,
)
from tests.support.optimizers import OPTIMIZERS

STEPS = 100_000
LOOK_EVERY = 100  # steps: gauges take an SVD
SHAPES = {"embedding": (6, 4), "hidden": (8, 4), "head": (4, 6), "bias": (4,)}
NORMS = {
    "embedding": ColNorm(),
    "hidden": Spectral(3.0, orthogonalizer=NewtonSchulz(compute_dtype=jnp.float32)),
    "head": Sign(30.0),
    "bias": BiasRMS(2.0),
}
LABELS = {name: name for name in SHAPES}

KINDS = ("random", "zero", "sparse", "exploding")
# How large gradients grow: to where LMOs promise to be exact, or near the largest float16, so
# that a sum of them is beyond it.
LARGEST = {"bfloat16": 1e30, "float16": 2e4, "float32": 1e30}
# From 2⁻⁸ down, rounding a bfloat16 parameter loses the pull that keeps it in its ball.
LEARNING_RATE = 0.05


def gradients(key, share, dtype):
    """Makes one step's gradients of each kind, stacked; `share` is how much of the run is over."""
    numbers, tree_of = ravel_pytree(
        {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    )
    random = jax.random.normal(key, numbers.shape)
    steady = jax.random.normal(jax.random.key(0), numbers.shape)
    size = jnp.exp(share * jnp.log(LARGEST[dtype]))
    sparse = jnp.where(random > 2.3, random, 0)  # one in a hundred
    kinds = (random, jnp.zeros_like(random), sparse, size * (steady + 0.1 * random))
    return jax.vmap(tree_of)(jnp.stack(kinds).astype(dtype))


def train(optimizer, params, steps):
    """Trains on each kind of gradients; returns the last parameters and, as looked at now and then,
    gauges and whether all was finite.
    """
    dtype = params["bias"].dtype.name
    init, update = jax.vmap(optimizer.init), jax.vmap(optimizer.update)

    def step(carry, count):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(1), count)
        updates, state = update(gradients(key, count / steps, dtype), state, params)
        return (optax.apply_updates(params, updates), state), None

    def look_after_some(carry, start):
        carry, _ = jax.lax.scan(step, carry, start + jnp.arange(LOOK_EVERY))
        params, _ = carry
        gauges = {name: jax.vmap(NORMS[name].gauge)(params[name]) for name in SHAPES}
        floats = [
            leaf for leaf in jax.tree.leaves(carry) if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        finite = [jnp.isfinite(leaf).reshape(len(KINDS), -1).all(1) for leaf in floats]
        return carry, (gauges, jnp.stack(finite).all(0))

    @jax.jit
    def run(params):
        starts = jnp.arange(0, steps, LOOK_EVERY)
        return jax.lax.scan(look_after_some, (params, init(params)), starts)

    (params, _), (gauges, finite) = run(params)
    return params, gauges, finite


QUICK = (("scion", "bfloat16"), ("unconstrained scion_light", "float16"))


@pytest.mark.parametrize(
    ("name", "dtype", "steps"),
    [
        *((*case, 2_000) for case in QUICK),
        *(
            pytest.param(name, dtype, STEPS, marks=pytest.mark.slow)
            for dtype in LARGEST
            for name in OPTIMIZERS
        ),
    ],
)
def test_stays_finite_and_within_bounds(name, dtype, steps):
    case = OPTIMIZERS[name]
    optimizer = case.build(LEARNING_RATE, NORMS, LABELS, **case.options)
    shapes = {leaf: jax.ShapeDtypeStruct(shape, dtype) for leaf, shape in SHAPES.items()}
    start = init_params(jax.random.key(0), shapes, NORMS, LABELS)
    start = jax.tree.map(lambda x: jnp.stack([x] * len(KINDS)), start)
    params, gauges, finite = train(optimizer, start, steps)
    assert np.all(finite), dict(zip(KINDS, np.all(finite, 0), strict=True))

    constrained = case.needs_params and "unconstrained" not in name
    # A step is rounded by half a last place, and undoes a share γ of what that left outside; one
    # that is not lost to a long parameter of 16 bits is rounded up to at most twice its length.
    outside = 1e-2 + float(jnp.finfo(dtype).eps) / (2 * LEARNING_RATE)
    lengthened = 1.01 if dtype == "float32" else 2.0
    made = np.arange(LOOK_EVERY, steps + 1, LOOK_EVERY)[:, None] / case.calls_per_step
    for leaf, sizes in gauges.items():
        first = np.asarray(jax.vmap(NORMS[leaf].gauge)(start[leaf]), float)
        bound = 1 + outside if constrained else first + lengthened * LEARNING_RATE * made
        assert np.all(sizes <= bound), (leaf, np.max(sizes - bound, 0))
        if constrained:
            assert np.max(sizes) > 0.9, leaf  # the ball is used
        elif case.options.get("weight_decay", 0.0) == 0:
            np.testing.assert_array_equal(params[leaf][KINDS.index("zero")], start[leaf][0])


def average(momentum, dtype):
    """Makes a stage whose state holds the average, and tells what the average is in the state."""
    return average_gradients(momentum, dtype), lambda state: state.average


def light(momentum, dtype):
    """The same for the sum that `scion_light` keeps, here scaled to an average."""
    norm = Sign(layout="bio")
    optimizer = scion_light(0.1, norm, momentum=momentum, momentum_dtype=dtype, unconstrained=True)
    return optimizer, lambda state: state.gradient_sum.astype(jnp.float32) * momentum


def averages(keep, momentum, steps):
    """Runs averages in every dtype over the same gradients; returns a dictionary of them.

    The gradients are steady, noisy, fading, and turning halfway to another direction, smaller.
    Averages are looked at a hundred times in the second half.
    """
    one, other = jax.random.normal(jax.random.key(0), (2, 8, 4))
    stages = {dtype: keep(momentum, dtype) for dtype in ("float32", "bfloat16", "float16")}

    def step(states, count):
        share = count / steps
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), count), one.shape)
        turning = jnp.where(share < 0.5, one, 2.0**-6 * other)
        g = jnp.stack([one, one + noise, jnp.exp(-5 * share) * one, turning])
        return {d: stages[d][0].update(g, states[d])[1] for d in stages}, None

    def look_after_some(states, start):
        states, _ = jax.lax.scan(step, states, start + jnp.arange(steps // 200))
        return states, {d: stages[d][1](states[d]) for d in stages}

    starts = steps // 2 + jnp.arange(0, steps // 2, steps // 200)
    states = {d: stages[d][0].init(jnp.zeros((4, *one.shape))) for d in stages}
    states, _ = jax.lax.scan(step, states, jnp.arange(steps // 2))
    return jax.lax.scan(look_after_some, states, starts)[1]


@pytest.mark.parametrize(
    ("momentum", "steps"),
    [
        (0.01, 10_000),
        *(pytest.param(alpha, STEPS, marks=pytest.mark.slow) for alpha in (0.1, 0.01, 0.001)),
    ],
)
@pytest.mark.parametrize("keep", [average, light])
def test_averages_do_not_stall(keep, momentum, steps):
    """An average in 16 bits errs by a last place at a time, at random, and so does its LMO."""
    kept = jax.jit(averages, static_argnums=(0, 1, 2))(keep, momentum, steps)
    exact = np.asarray(kept.pop("float32"), np.float64)
    for dtype, found in kept.items():
        # One rounding errs by a share `eps` of a number at most, and about 1/(2α) of them add up.
        spread = float(jnp.finfo(dtype).eps) / np.sqrt(2 * momentum)
        found = np.asarray(found, np.float64)
        errors = np.linalg.norm(found - exact, axis=(-2, -1))
        assert np.all(errors <= 2 * spread * np.linalg.norm(exact, axis=(-2, -1))), dtype
        cosines = np.sum(polar_factors(found) * polar_factors(exact), axis=(-2, -1)) / 4
        assert np.all(cosines > 0.97), (dtype, cosines.min(0))


def polar_factors(matrices):
    u, _, vt = np.linalg.svd(matrices, full_matrices=False)
    return u @ vt
