"""The stages: averages, LMOs and decay, each on its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Sign,
    Spectral,
    average_gradients,
    decay_weights,
    label_by_path,
    scale_by_lmo,
    scion,
)

pytestmark = pytest.mark.fast


def run(transformation, gradients, params=None):
    state = transformation.init(gradients[0])
    outputs = []
    for g in gradients:
        updates, state = transformation.update(g, state, params)
        outputs.append(updates)
    return outputs, state


@pytest.mark.parametrize("grad_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_average_dtypes(grad_dtype, dtype):
    (output,), state = run(average_gradients(0.1, dtype), [jnp.ones(3, grad_dtype)])
    assert state.average.dtype == (dtype or grad_dtype)
    assert output.dtype == jnp.float32  # what is stored may vanish in float16, the step must not


def test_average_is_taken_in_float32():
    """A bfloat16 buffer rounds once per step; the sum itself does not lose small gradients."""
    average = average_gradients(0.5, jnp.bfloat16)
    state = average.init(jnp.zeros(1))._replace(average=jnp.ones(1, jnp.bfloat16))
    output, _ = average.update(jnp.full(1, 2.0**-12), state)
    assert float(output[0]) == 0.5 + 2.0**-13


def test_full_momentum_remembers_nothing_not_even_a_nan():
    for momentum in (1.0, jnp.float32(1.0), lambda count: 1.0):
        (_, output), _ = run(average_gradients(momentum), [jnp.full(2, jnp.nan), jnp.ones(2)])
        np.testing.assert_array_equal(output, 1.0)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_look_ahead_is_of_the_average_before_it_is_stored(dtype):
    """What is stored is what it would be without."""
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.standard_normal(50), jnp.float32) for _ in range(3)]
    averages, state = run(average_gradients(0.25, dtype), gradients)
    for optimism in (0.375, jnp.float32(0.375), lambda count: 0.375):
        ahead, other = run(average_gradients(0.25, dtype, optimism), gradients)
        chex.assert_trees_all_equal(other, state)
        for d_bar, d, g in zip(ahead, averages, gradients, strict=True):
            np.testing.assert_allclose(d_bar, 0.625 * d + 0.375 * g, rtol=1e-6, atol=1e-6)


def test_a_look_ahead_all_the_way_is_the_gradient_whatever_came_before():
    """A schedule that leaves its range is clipped to it."""
    for optimism in (1.0, jnp.float32(1.0), lambda count: 1.0 + jnp.float32(count)):
        (_, output), _ = run(
            average_gradients(0.5, optimism=optimism), [jnp.full(2, 9.0), jnp.ones(2)]
        )
        np.testing.assert_array_equal(output, 1.0)


def test_no_look_ahead_costs_nothing():
    """Neither as a number nor as a schedule of numbers."""
    x = jnp.ones(3)
    plain, *others = (
        str(jax.make_jaxpr(average.update)(x, average.init(x)))
        for average in (
            average_gradients(0.1),
            average_gradients(0.1, optimism=0),
            average_gradients(0.1, optimism=optax.constant_schedule(0.0)),
        )
    )
    assert others == [plain] * 2


def test_lmo_of_every_leaf():
    norm = ColNorm(2.0)
    tree = {"a": jnp.ones((3, 4)), "c": [jnp.eye(2), None]}
    (output,), state = run(scale_by_lmo(norm), [tree])
    assert state == optax.EmptyState()
    for got, d in zip(jax.tree.leaves(output), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(got, norm.lmo(d))


def test_many_norms_are_one_stack():
    """By labels or an assignment, for each leaf its norm's; one iteration for one shape."""
    norms = {"q": Spectral(2.0), "k": Spectral(3.0, layout="oi"), "head": Sign()}
    params = {"q0": jnp.eye(4, 6), "k0": jnp.eye(4, 6), "q1": jnp.ones((4, 6)), "head": jnp.ones(3)}
    labels = label_by_path([("^q", "q"), ("^k", "k"), ("^head", "head")])
    lmo = scale_by_lmo(norms, labels)
    update = jax.jit(lambda d: lmo.update(d, lmo.init(d), d)[0])
    for name, v in update(params).items():
        norm = norms[labels(params)[name]]
        np.testing.assert_allclose(v, norm.lmo(params[name]), atol=1e-2)
    alone = scale_by_lmo(Spectral()).update
    products = [
        jax.jit(function).lower(tree).as_text().count("dot_general")
        for function, tree in ((update, params), (lambda d: alone(d, ())[0], {"q": params["q0"]}))
    ]
    assert products[0] == products[1]


@pytest.mark.parametrize("mu", [0.5, jnp.float32(0.5), np.float64(0.5)])
def test_decay(mu):
    updates, params = jnp.full(2, 1.0, jnp.bfloat16), jnp.full(2, 4.0, jnp.bfloat16)
    decay = decay_weights(mu, Auto())
    output, _ = decay.update(updates, decay.init(params), params)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(output, jnp.full(2, 3.0, jnp.bfloat16))
    with pytest.raises(ValueError, match="params"):
        decay.update(updates, decay.init(params), None)
    free = {"x": BiasRMS(constrained=False), "y": Auto()}
    decay, tree = decay_weights(mu, free, {"a": "x", "b": "y"}), {"a": params, "b": params}
    output, _ = decay.update({"a": updates, "b": updates}, decay.init(tree), tree)
    assert (float(output["a"][0]), float(output["b"][0])) == (1.0, 3.0)


def test_no_decay_does_nothing():
    none = decay_weights(0.0, Auto())
    updates = jnp.ones(2)
    assert none.update(updates, none.init(updates), None)[0] is updates


def test_a_chain_to_read_aloud():
    """What the optimizers are, composed by hand."""
    norms, labels = {"w": Spectral(3.0), "b": BiasRMS()}, {"w": "w", "b": "b"}
    params = {"w": jnp.eye(3, 4) + 0.1, "b": jnp.arange(3.0)}
    chain = optax.chain(
        average_gradients(0.3),
        scale_by_lmo(norms, labels),
        decay_weights(1.0, norms, labels),
        optax.scale_by_learning_rate(0.1),
    )
    ours = scion(0.1, norms, labels, momentum=0.3)
    expected, _ = ours.update(params, ours.init(params), params)
    found, _ = chain.update(params, chain.init(params), params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
