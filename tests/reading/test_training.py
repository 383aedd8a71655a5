"""A training step of a user's network in Flax NNX, Flax Linen and Equinox."""

import jax
import jax.numpy as jnp
import optax
import pytest

from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Sign,
    Spectral,
    init_params,
    label_by_path,
    scaled_relu,
    scion,
)

pytestmark = pytest.mark.fast

NORMS = {"first": ColNorm(), "hidden": Spectral(2.0), "last": Sign(16.0), "bias": BiasRMS()}
STEPS = 100
LEARNING_RATE = optax.linear_schedule(0.1, 0.0, STEPS)


def data():
    """Which of two classes a token belongs to, with some hidden units to spare."""
    tokens = jax.random.randint(jax.random.key(0), (256,), 0, 12)
    return tokens, tokens % 2


def cross_entropy(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def inside(tree, norms, labels):
    gauges = jax.tree.map(lambda label, x: norms[label].gauge(x), labels(tree), tree)
    return all(float(gauge) <= 1 + 1e-4 for gauge in jax.tree.leaves(gauges))


def test_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(12, 16, rngs=rngs)
            self.hidden = nnx.Linear(16, 16, rngs=rngs)
            self.head = nnx.Linear(16, 2, use_bias=False, rngs=rngs)

        def __call__(self, tokens):
            return self.head(scaled_relu(self.hidden(self.embed(tokens))))

    labels = label_by_path(
        [("bias$", "bias"), ("^embed/", "first"), ("^hidden/kernel$", "hidden"), ("^head", "last")]
    )
    model = Network(nnx.Rngs(0))
    nnx.update(model, init_params(jax.random.key(1), nnx.state(model, nnx.Param), NORMS, labels))
    assert inside(nnx.state(model, nnx.Param), NORMS, labels)
    optimizer = nnx.Optimizer(
        model, scion(LEARNING_RATE, NORMS, labels, momentum=0.5), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, tokens, classes):
        loss, gradients = nnx.value_and_grad(lambda m: cross_entropy(m(tokens), classes))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer, *data())) for _ in range(STEPS)]
    assert losses[-1] < 0.1 * losses[0]
    assert inside(nnx.state(model, nnx.Param), NORMS, labels)


def test_linen():
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(12, 16, embedding_init=ColNorm().init, name="embed")(tokens)
            x = scaled_relu(linen.Dense(16, kernel_init=Spectral(2.0).init, name="hidden")(x))
            return linen.Dense(2, use_bias=False, kernel_init=Sign(16.0).init, name="head")(x)

    labels = label_by_path(
        [("bias$", "bias"), ("embed/", "first"), ("hidden/kernel$", "hidden"), ("head", "last")]
    )
    model = Network()
    params = model.init(jax.random.key(0), data()[0])["params"]
    assert inside(params, NORMS, labels)  # by kernel_init alone
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=scion(LEARNING_RATE, NORMS, labels, momentum=0.5)
    )

    @jax.jit
    def step(state, tokens, classes):
        def loss_of(params):
            return cross_entropy(state.apply_fn({"params": params}, tokens), classes)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(STEPS):
        state, loss = step(state, *data())
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    assert inside(state.params, NORMS, labels)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    norm = Auto(8.0, layout="oi")  # Equinox keeps weights as (output, input)
    model = eqx.nn.MLP(12, 2, 16, 2, activation=scaled_relu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params = init_params(jax.random.key(1), params, norm)
    optimizer = scion(LEARNING_RATE, norm, momentum=0.5)
    state = optimizer.init(params)
    assert max(float(norm.gauge(x)) for x in jax.tree.leaves(params)) == pytest.approx(1, abs=1e-5)

    @jax.jit
    def step(params, state, tokens, classes):
        def loss_of(params):
            logits = jax.vmap(eqx.combine(params, static))(jax.nn.one_hot(tokens, 12))
            return cross_entropy(logits, classes)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, *data())
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    assert all(float(norm.gauge(x)) <= 1 + 1e-4 for x in jax.tree.leaves(params))
    # the layout is read the right way round: the first weight is (16, 12)
    first = params.layers[0].weight
    assert jnp.linalg.norm(first, 2) <= 8.0 * (16 / 12) ** 0.5 * (1 + 1e-4)
