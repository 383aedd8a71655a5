"""Training with infer_norms and init_params: scikit-learn's digits, models with norm layers."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from sklearn import datasets

from scion_jax import Sign, Spectral, infer_norms, init_params, scion, unconstrained_scion

STEPS, BATCH, LEARNING_RATE = 150, 128, 2**-7


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


def digits():
    images, classes = datasets.load_digits(return_X_y=True)
    images = jnp.asarray(images, jnp.float32).reshape(-1, 8, 8, 1) / 8 - 1
    order = jax.random.permutation(jax.random.key(0), len(images))
    return images[order], jnp.asarray(classes, jnp.int32)[order]


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def accuracy(make, algorithm):
    images, classes = digits()
    model = make(nnx.Rngs(0))
    batch = images[:BATCH], classes[:BATCH]
    norms = infer_norms(
        loss, model, *batch, hidden=Spectral(8.0), first=Spectral(8.0), last=Sign(32.0)
    )
    params = nnx.state(model, nnx.Param)
    nnx.update(model, init_params(jax.random.key(1), params, norms))
    optimizer = nnx.Optimizer(model, algorithm(LEARNING_RATE, norms), wrt=nnx.Param)

    @nnx.jit
    def train(model, optimizer, x, y):
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    held_out = 360
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(2), step)
        batch = jax.random.randint(key, (BATCH,), held_out, len(images))
        train(model, optimizer, images[batch], classes[batch])
    model.eval()
    return float((model(images[:held_out]).argmax(-1) == classes[:held_out]).mean())


@pytest.mark.parametrize(("make", "algorithm"), [(Mlp, scion), (Cnn, unconstrained_scion)])
def test_digits(make, algorithm):
    reached = accuracy(make, algorithm)
    print(f"{make.__name__} {algorithm.__name__}: {reached:.3f}")
    assert reached >= 0.94
