"""Steps are differentiable, as unrolled training and learned hyperparameters want them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from scion_jax import NewtonSchulz, unconstrained_clipped_scion
from tests.support.norms import gaussian, make
from tests.support.optimizers import every_optimizer

pytestmark = pytest.mark.unoptimized

SHAPES = {"Spectral": (3, 4), "BiasRMS": (3,), "ColNorm": (3, 2), "RowNorm": (3, 2)}
SHAPES |= {"Euclidean": (2,), "Sign": (2, 2)}
LABELS = {name: name for name in SHAPES}
STRAIGHT = NewtonSchulz(compute_dtype="float64")


def tree(seed, scale=1.0):
    return {n: jnp.asarray(scale * gaussian(s, seed)) for n, s in SHAPES.items()}


def after(case, count, gradients, rate, rho, radius):
    """Projects the parameters after so many steps onto a fixed direction."""
    norms = {name: make(name, {}, None, radius=radius * 1.0) for name in SHAPES}
    options = {**case.options} | ({"rho": rho} if "rho" in case.options else {})
    optimizer = case.build(rate, norms, LABELS, **options)
    params = tree(0, 0.1)
    state = optimizer.init(params)
    for k in range(count * case.calls_per_step):
        turned = jax.tree.map(lambda g, k=k: g + k * jnp.roll(g, 1), gradients)
        updates, state = optimizer.update(turned, state, params)
        params = optax.apply_updates(params, updates)
    return sum(jnp.vdot(tree(9)[name], params[name]) for name in SHAPES)


@pytest.mark.parametrize("count", [1, 3])
@every_optimizer
def test_gradients_are_differences(x64, case, count):
    """With respect to gradients, learning rate, ρ and radius; some steps clip and some do not."""
    function = jax.jit(lambda *arguments: after(case, count, *arguments))
    for rho in (1e-2, 1e3) if "rho" in case.options else (1.0,):
        arguments = (tree(1), jnp.float64(0.1), jnp.float64(rho), jnp.float64(2.0))
        check_grads(function, arguments, 1, modes=["rev"], atol=1e-6, rtol=1e-5, eps=1e-6)


@every_optimizer
def test_at_zero_gradients_they_are_zero(x64, case):
    """As everywhere between the steps that the LMO of zero, which is zero, makes."""
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    found = jax.jit(jax.grad(lambda g: after(case, 1, g, 0.1, 1.0, 2.0)))(zeros)
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
