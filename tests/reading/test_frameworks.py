"""Modules, states and plain trees of frameworks; what an assignment is used with."""

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from scion_jax import Sign, infer_norms
from tests.reading.support import LINEAR, NORM, cross_entropy, read, shape, squares, under

pytestmark = pytest.mark.unoptimized

IMAGES, CLASSES = shape(4, 6), shape(4, dtype=jnp.int32)


class Net(nnx.Module):
    """With statistics and keys beside its parameters."""

    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", None))
        x = nn.Dense(8, kernel_init=init, name="hidden")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x))
        return nn.Dense(3, name="head")(nn.Dropout(0.5, deterministic=False)(x))


NET = {**under("hidden", LINEAR), **under("norm", NORM), "head/bias": "o", "head/kernel": "last io"}


def of_nnx(model, x, y):
    return cross_entropy(model(x), y)


def test_modules_states_and_plain_trees_of_nnx():
    abstract, model = nnx.eval_shape(lambda: Net(nnx.Rngs(0))), Net(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    for one in (abstract, model):
        assert read(of_nnx, one, IMAGES, CLASSES, last=Sign()) == NET
    after = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert all(a is b for a, b in zip(after, before, strict=True))  # reading leaves no trace
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    pure = nnx.to_pure_dict(state)

    def of_state(state, rest, x, y):
        return of_nnx(nnx.merge(graph, state, rest), x, y)

    def of_arrays(arrays, rest, x, y):
        filled = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(arrays))
        return of_state(filled, rest, x, y)

    first, *others = (
        infer_norms(of_nnx, model, IMAGES, CLASSES, last=Sign()),
        infer_norms(of_state, state, rest, IMAGES, CLASSES, last=Sign()),
        infer_norms(of_arrays, pure, rest, IMAGES, CLASSES, last=Sign()),
    )
    for assignment in (first, *others):
        assert assignment.norms == first.norms
        for tree in (state, pure, jax.eval_shape(lambda: pure)):
            labels = jax.tree.leaves(assignment.labels(tree))
            assert labels == jax.tree.leaves(first.labels(pure))


def test_variables_boxes_and_collections_of_linen():
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = jax.eval_shape(LinenNet().init, keys, IMAGES)

    def loss(params, statistics, x, y):
        both, rngs = {"params": params, "batch_stats": statistics}, {"dropout": keys["dropout"]}
        logits, state = LinenNet().apply(both, x, rngs=rngs, mutable=["batch_stats"])
        return cross_entropy(logits, y), state

    inputs = variables["batch_stats"], IMAGES, CLASSES
    options = {"last": Sign(), "has_aux": True}
    assert read(loss, variables["params"], *inputs, **options) == NET
    assignment = infer_norms(loss, variables["params"], *inputs, **options)
    for tree in ({"params": variables["params"]}, nn.meta.unbox(variables["params"])):
        labels = assignment.labels(flax.core.freeze(tree))
        assert len(jax.tree.leaves(labels)) == len(NET)
    with pytest.raises(ValueError, match=r"'batch_stats'.*variables\['params'\]"):
        assignment.labels(variables)
    with pytest.raises(ValueError, match=r"'hidden/kernle' is no parameter.*'hidden/kernel'"):
        assignment.labels({"hidden": {"kernle": shape(6, 8)}})


class Own(nn.Module):
    """Parameters that are made as variables, by a method beside `__call__`."""

    def setup(self):
        self.w = self.variable("params", "w", jnp.ones, (6, 8))
        self.decoder = nn.Dense(6)

    def __call__(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return x @ self.w.value


def test_methods_and_parameters_of_ones_own():
    model = Own()
    params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    decoder = under("decoder", LINEAR)
    assert read(lambda p, x: squares(model.apply(p, x)), params, IMAGES) == {"w": "io", **decoder}
    with pytest.warns(UserWarning, match="'params/decoder/bias', 'params/decoder/kernel'"):
        found = read(lambda p, x: squares(model.apply(p, x, method="encode")), params, IMAGES)
    assert found == {"w": "io", "decoder/bias": "unused o", "decoder/kernel": "unused oo"}
