"""Steps are differentiable, as unrolled training and learned hyperparameters want them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_vjp

from scion_jax import unconstrained_clipped_scion
from tests.support.norms import gaussian, make
from tests.support.optimizers import every_optimizer

pytestmark = pytest.mark.unoptimized

SHAPES = {"Spectral": (3, 4), "BiasRMS": (3,), "ColNorm": (3, 2), "RowNorm": (3, 2)}
SHAPES |= {"Euclidean": (2,), "Sign": (2, 2)}
LABELS = {name: name for name in SHAPES}


def tree(seed, scale=1.0):
    return {n: jnp.asarray(scale * gaussian(s, seed)) for n, s in SHAPES.items()}


def after(case, gradients, rate, rho, radius):
    """Projects the parameters after one step, and after three, onto a fixed direction."""
    norms = {n: make(n, {}, None, compute_dtype="float64", radius=radius) for n in SHAPES}
    options = {**case.options} | ({"rho": rho} if "rho" in case.options else {})
    optimizer = case.build(rate, norms, LABELS, **options)

    def step(carry, k):
        params, state = carry
        turned = jax.tree.map(lambda g: g + k * jnp.roll(g, 1), gradients)
        updates, state = optimizer.update(turned, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), sum(jnp.vdot(tree(9)[name], params[name]) for name in SHAPES)

    params, calls = tree(0, 0.1), case.calls_per_step
    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, jnp.arange(3.0 * calls))[1][calls - 1 :: 2 * calls]


@every_optimizer
def test_gradients_are_differences(x64, case):
    """With respect to gradients, learning rate, ρ and radius; some steps clip and some do not."""

    @jax.jit  # numbers and their gradients in one program
    def both(arguments, cotangent):
        numbers, back = jax.vjp(lambda *arguments: after(case, *arguments), *arguments)
        return numbers, back(cotangent)

    def numbers(*arguments):
        return both(arguments, jnp.zeros(2))[0]

    def numbers_and_back(*arguments):
        return numbers(*arguments), lambda cotangent: both(arguments, jnp.asarray(cotangent))[1]

    rate, radius = jnp.float64(0.1), jnp.float64(2.0)
    for rho in (1e-2, 1e3) if "rho" in case.options else (1.0,):
        arguments = (tree(1), rate, jnp.float64(rho), radius)
        check_vjp(numbers, numbers_and_back, arguments, atol=1e-6, rtol=1e-5, eps=1e-6)
    # At zero gradients they are zero, as the LMO of zero is.
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    _, (found, *_) = both((zeros, rate, jnp.float64(1.0), radius), jnp.array([1.0, 0.0]))
    chex.assert_tree_all_finite(found)
    if case.scale_free:
        chex.assert_trees_all_equal(found, zeros)


def test_straight_downhill(x64):
    """One vector, whose step has cosine 1 with it up to rounding."""

    def step(gradient):
        optimizer = unconstrained_clipped_scion(
            0.1, make("BiasRMS", {}, None), rho=100.0, momentum=1.0
        )
        return optimizer.update(gradient, optimizer.init(gradient), gradient)[0].sum()

    found = jax.jit(jax.vmap(jax.grad(step)))
    for size in (1, 2, 7):
        vectors = jnp.asarray(gaussian((20, size)))
        lengths = np.sqrt(size) * np.linalg.norm(vectors, axis=1, keepdims=True)
        # ρ is not reached: the step is 0.1 · ‖d‖_* / ρ · d / RMS(d) = −0.1 · size · d / ρ
        assert lengths.max() < 100
        np.testing.assert_allclose(found(vectors), -0.1 * size / 100, rtol=1e-9)
