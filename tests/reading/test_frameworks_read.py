"""Modules, states and plain trees of frameworks; what an assignment is used with."""

import flax
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from leaves import LINEAR, NORM, cross_entropy, read, shape, squares, under

from scion_jax import Sign, Spectral, infer_norms, init_params, scale_by_lmo, scion

pytestmark = pytest.mark.unoptimized

IMAGES, CLASSES = shape(4, 6), shape(4, dtype=jnp.int32)


class Net(nnx.Module):
    """With statistics and keys beside its parameters."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", None))
        x = nn.BatchNorm(use_running_average=False, name="norm")(
            nn.Dense(8, kernel_init=init, name="hidden")(x)
        )
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(x))
        return nn.Dense(3, name="head")(x)


NET = {**under("hidden", LINEAR), **under("norm", NORM), "head/bias": "o", "head/kernel": "last io"}
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def of_nnx(model, x, y):
    return cross_entropy(model(x), y)


def of_linen(variables, x, y):
    logits, state = LinenNet().apply(
        variables, x, rngs={"dropout": KEYS["dropout"]}, mutable=["batch_stats"]
    )
    return cross_entropy(logits, y), state


def linen_variables():
    return jax.eval_shape(LinenNet().init, KEYS, IMAGES)


def test_modules_states_and_plain_trees():
    model = Net(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert read(of_nnx, model, IMAGES, CLASSES, last=Sign()) == NET
    after = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert all(a is b for a, b in zip(after, before, strict=True))  # reading leaves no trace
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    pure = nnx.to_pure_dict(state)

    def of_state(state, rest, x, y):
        return of_nnx(nnx.merge(graph, state, rest), x, y)

    def of_arrays(arrays, rest, x, y):
        filled = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(arrays))
        return of_state(filled, rest, x, y)

    read_off = [
        infer_norms(of_nnx, model, IMAGES, CLASSES, last=Sign()),
        infer_norms(of_state, state, rest, IMAGES, CLASSES, last=Sign()),
        infer_norms(of_arrays, pure, rest, IMAGES, CLASSES, last=Sign()),
    ]
    for assignment in read_off:
        assert assignment.norms == read_off[0].norms
        for tree in (state, pure, jax.eval_shape(lambda: pure)):
            labels = jax.tree.leaves(assignment.labels(tree))
            assert labels == jax.tree.leaves(read_off[0].labels(pure))


def test_abstract_modules_with_statistics_and_keys():
    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert read(of_nnx, model, IMAGES, CLASSES, last=Sign()) == NET


def test_variables_boxes_and_collections_of_linen():
    variables = linen_variables()
    statistics = variables["batch_stats"]

    def with_statistics(params, statistics, x, y):
        return of_linen({"params": params, "batch_stats": statistics}, x, y)

    inputs = statistics, IMAGES, CLASSES
    options = {"last": Sign(), "has_aux": True}
    assert read(with_statistics, variables["params"], *inputs, **options) == NET
    assignment = infer_norms(with_statistics, variables["params"], *inputs, **options)
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


def test_a_train_state_and_multi_transform_take_a_step():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
    x, y = jax.random.normal(jax.random.key(0), (4, 6)), jnp.arange(4) % 3
    params = model.init(jax.random.key(1), x)

    def loss(params, x, y):
        return cross_entropy(model.apply(params, x), y)

    norms = infer_norms(loss, params, x, y, hidden=Spectral(2.0), last=Sign(4.0))
    params = init_params(jax.random.key(2), params, norms)
    routed = {label: scale_by_lmo(norm) for label, norm in norms.norms.items()}
    several = optax.chain(optax.multi_transform(routed, norms.labels), optax.scale(-0.05))
    for optimizer in (scion(0.05, norms), several):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

        @jax.jit
        def step(state):
            value, gradients = jax.value_and_grad(loss)(state.params, x, y)
            return state.apply_gradients(grads=gradients), value

        losses = []
        for _ in range(3):
            state, value = step(state)
            losses.append(float(value))
        assert losses[-1] < losses[0]
