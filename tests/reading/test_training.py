"""Training in Flax NNX, Flax Linen and Equinox, with norms that are inferred or told."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from sklearn import datasets

from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Sign,
    Spectral,
    gauges,
    infer_norms,
    init_params,
    label_by_path,
    scale_by_lmo,
    scaled_relu,
    scion,
    unconstrained_scion,
)
from tests.reading.support import cross_entropy

pytestmark = pytest.mark.unoptimized


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)])
        self.norms = nnx.List([nnx.LayerNorm(64, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(len(x), 64)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x)


class Cnn(nnx.Module):
    def __init__(self, rngs):
        widths = [(1, 16), (16, 32), (32, 32)]
        self.convs = nnx.List([nnx.Conv(*w, (3, 3), use_bias=False, rngs=rngs) for w in widths])
        # airbench's momentum; after so few steps Flax's 0.99 would still hold the start's.
        self.norms = nnx.List([nnx.BatchNorm(out, momentum=0.6, rngs=rngs) for _, out in widths])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
            x = nnx.max_pool(x, (2, 2), (2, 2)) if x.shape[1] > 2 else x
        return self.head(x.mean((1, 2)))


def inside(params, *norms):
    return max(map(float, jax.tree.leaves(gauges(params, *norms)))) <= 1 + 1e-4


@pytest.mark.parametrize(("make", "algorithm"), [(Mlp, scion), (Cnn, unconstrained_scion)])
def test_nnx_learns_digits(make, algorithm):
    def loss(model, x, y):
        return cross_entropy(model(x), y)

    images, classes = datasets.load_digits(return_X_y=True)
    images = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8, 1) / 8 - 1
    order = jax.random.permutation(jax.random.key(0), len(images))
    images, classes, held_out = images[order], jnp.asarray(classes, jnp.int32)[order], 360
    model, wide = make(nnx.Rngs(0)), Spectral(8.0)
    norms = infer_norms(
        loss, model, images[:128], classes[:128], hidden=wide, first=wide, last=Sign(32.0)
    )
    nnx.update(model, init_params(jax.random.key(1), nnx.state(model, nnx.Param), norms))
    assert inside(nnx.state(model, nnx.PathContains("head")), norms)
    optimizer = nnx.Optimizer(model, algorithm(2**-7, norms), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, x, y):
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    for step in range(90):
        key = jax.random.fold_in(jax.random.key(2), step)
        batch = jax.random.randint(key, (128,), held_out, len(images))
        train(model, optimizer, images[batch], classes[batch])
    model.eval()
    assert float((model(images[:held_out]).argmax(-1) == classes[:held_out]).mean()) >= 0.94
    if algorithm is scion:
        assert inside(nnx.state(model, nnx.Param), norms)


# Which of two classes a token belongs to, with some hidden units to spare.
TOKENS = jax.random.randint(jax.random.key(0), (256,), 0, 12)
CLASSES = TOKENS % 2
LEARNING_RATE = optax.linear_schedule(0.1, 0.0, 100)


@pytest.mark.fast
def test_linen_with_a_train_state():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(12, 16, embedding_init=ColNorm().init, name="embed")(tokens)
            x = scaled_relu(nn.Dense(16, kernel_init=Spectral(2.0).init, name="hidden")(x))
            return nn.Dense(2, use_bias=False, kernel_init=Sign(16.0).init, name="head")(x)

    model = Network()
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def loss(params, tokens, classes):
        return cross_entropy(model.apply({"params": params}, tokens), classes)

    names = [("bias$", "bias"), ("embed/", "first"), ("hidden/kernel$", "hidden"), ("head", "last")]
    norms = {"first": ColNorm(), "hidden": Spectral(2.0), "last": Sign(16.0), "bias": BiasRMS()}
    told = norms, label_by_path(names)
    assert inside(params, *told)  # by kernel_init alone
    read = infer_norms(loss, params, TOKENS, CLASSES, hidden=Spectral(2.0), last=Sign(4.0))
    routed = {label: scale_by_lmo(norm) for label, norm in read.norms.items()}
    several = optax.chain(optax.multi_transform(routed, read.labels), optax.scale(-0.05))
    for optimizer, steps, least in (
        (scion(LEARNING_RATE, *told, momentum=0.5), 100, 0.1),
        (scion(0.05, read), 3, 1.0),
        (several, 3, 1.0),
    ):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

        @jax.jit
        def step(state):
            value, gradients = jax.value_and_grad(loss)(state.params, TOKENS, CLASSES)
            return state.apply_gradients(grads=gradients), value

        first = float(loss(params, TOKENS, CLASSES))
        for _ in range(steps):
            state, value = step(state)
        assert float(value) < least * first
        assert steps < 100 or inside(state.params, *told)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    norm = Auto(8.0, layout="oi")  # Equinox keeps weights as (output, input)
    model = eqx.nn.MLP(12, 2, 16, 2, activation=scaled_relu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params = init_params(jax.random.key(1), params, norm)
    optimizer = scion(LEARNING_RATE, norm, momentum=0.5)
    state = optimizer.init(params)
    assert max(jax.tree.leaves(gauges(params, norm))) == pytest.approx(1, abs=1e-5)

    @jax.jit
    def step(params, state):
        def loss_of(params):
            logits = jax.vmap(eqx.combine(params, static))(jax.nn.one_hot(TOKENS, 12))
            return cross_entropy(logits, CLASSES)

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(100):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    assert inside(params, norm)
    # the layout is read the right way round: the first weight is (16, 12)
    first = params.layers[0].weight
    assert jnp.linalg.norm(first, 2) <= 8.0 * (16 / 12) ** 0.5 * (1 + 1e-4)
