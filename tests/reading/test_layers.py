"""Every leaf of Flax's layers, in Linen and NNX: alone, stacked along any axis, mapped, wrapped."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from scion_jax import Sign
from tests.reading.support import (
    ATTENTION,
    LINEAR,
    NORM,
    cross_entropy,
    of,
    read,
    shape,
    squares,
    stack,
    under,
)

pytestmark = pytest.mark.unoptimized

ROWS, SEQUENCE, WIDE, IMAGE = shape(2, 4), shape(2, 5, 4), shape(2, 5, 16), shape(2, 8, 8, 4)
CONV, HEADS = of("ssio", "o"), of("oio", "oo")


# Linen.


class Model(nn.Module):
    """What is done with layers, which are made on the way; scanned, it has nothing to return."""

    call: Callable
    is_scanned: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        return (self.call(self, x), None) if self.is_scanned else self.call(self, x)


def scan(call, axis=0, length=3, name=None, kind=Model, **options):
    options |= {"split_rngs": {"params": True}, "length": length}
    return nn.scan(kind, {"params": axis}, **options)(call, is_scanned=True, name=name)


def vmap(module, axis, **options):
    return nn.vmap(module, {"params": axis}, split_rngs={"params": True}, **options)


def everything(module, x):
    """A layer of a transformer, with about all that there is."""
    x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="norm")(x))
    gain = module.param("gain", nn.initializers.ones, ())
    x = x + gain * nn.Dense(16, name="down")(nn.WeightNorm(nn.Dense(16), name="up")(x))
    x = nn.Conv(16, (3,), feature_group_count=16, name="depthwise")(x)
    return x + nn.Einsum((2, 16, 8), "btd,ndh->btnh", name="heads")(x).reshape(x.shape)


def square(_, x):
    return nn.Dense(x.shape[-1])(x)


def boxed(module, x):
    """Boxes, one of which the layer opens itself."""
    ones = nn.with_partitioning(nn.initializers.ones, ("embed",))
    gain = module.param("gain", ones, x.shape[-1:], unbox=False)
    return nn.Dense(x.shape[-1], kernel_init=BOXED)(x * gain.value)


def twice(axis):
    """Calls the same layers twice."""

    def call(_, x):
        layers = scan(square, axis, 16, name="layers")
        return layers(layers(x)[0])[0]

    return Model(call)


def experts(_, x):
    return vmap(nn.Dense, 0, in_axes=None, axis_size=2)(16, name="Vmap_0")(x).sum(0)


def qkv_apart(_, x):
    return nn.dot_product_attention(*nn.Einsum((3, 4, 16, 8), "BTD,SNDH->SBTNH", name="qkv")(x))


class LowRank(nn.Module):
    """LoRA by `share_scope`: the kernels are in the scope of the layer that it wraps."""

    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        a = nn.Dense(2, use_bias=False, name="a")(x)
        return self.base(x) + nn.Dense(self.base.features, use_bias=False, name="b")(a)


class Subclass(nn.Dense):
    pass


class Listed(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(4), nn.remat(nn.Dense)(4)]

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
LOGICAL = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
BY_EINSUM = partial(nn.Einsum, use_bias=False, kernel_init=nn.initializers.normal())
LAYER = {
    **under("attention", ATTENTION),
    **under("norm", NORM),
    **under("Dense_0", "down", LINEAR),
    "up/Dense_0/kernel/scale": "o",
    **under("depthwise", of("sio[16]", "o")),
    **under("heads", HEADS),
}
SQUARE = under("Dense_0", LINEAR)
GATES = under(*(f"{side}{gate}" for side in "ih" for gate in "ifgo"), of("io"))
GATES |= under(*(f"h{gate}" for gate in "ifgo"), {"bias": "o"})
RESET = under(*(f"{side}{gate}" for side in "ih" for gate in "rzn"), of("io"))
RESET |= under("ir", "iz", "in", "hn", {"bias": "o"})
NORMS = [nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(4), nn.InstanceNorm()]
BATCHED = nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,))
LINEN = {
    "dense": (nn.Dense(8), WIDE, LINEAR),
    "subclass": (Subclass(8), WIDE, LINEAR),
    "boxed": (nn.Dense(8, kernel_init=BOXED), WIDE, LINEAR),
    "logical": (nn.Dense(8, kernel_init=LOGICAL), WIDE, LINEAR),
    "general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), WIDE, of("iioo", "oo")),
    "general with batch": (BATCHED, WIDE, of("bioo", "boo")),
    "qkv apart": (Model(qkv_apart), WIDE, under("qkv", of("boio", "boo"))),
    "merging einsum": (BY_EINSUM((5, 16, 8), "btd,tdo->bo"), WIDE, of("iio")),
    "einsum without output": (BY_EINSUM((16,), "btd,d->bt"), WIDE, of("o")),
    "gain by einsum": (BY_EINSUM((16,), "btd,d->btd"), WIDE, of("o")),
    "gains by einsum": (BY_EINSUM((5, 16), "btd,td->bt"), WIDE, of("bo")),
    "heads that lead the result": (BY_EINSUM((16, 2, 3), "btd,dnh->nhbt"), WIDE, of("ioo")),
    "called einsum": (
        Model(lambda _, x: nn.Einsum((2, 16, 8), name="einsum")(x, "btd,ndh->btnh")), WIDE,
        under("einsum", HEADS)),
    "conv": (nn.Conv(8, (3, 3)), IMAGE, CONV),
    "conv 1d": (nn.Conv(8, (3,)), WIDE, of("sio", "o")),
    "conv that is called like a gate": (nn.Conv(8, (3,), name="ih"), WIDE, of("sio", "o")),
    "grouped conv": (nn.Conv(8, (3, 3), feature_group_count=2), IMAGE, of("ssio[2]", "o")),
    "local conv": (nn.ConvLocal(8, (3, 3), padding="VALID"), IMAGE, of("bbio", "bbo")),
    "conv transpose": (nn.ConvTranspose(8, (3, 3)), IMAGE, CONV),
    "turned conv transpose": (
        nn.ConvTranspose(8, (3, 3), transpose_kernel=True), IMAGE, of("ssoi", "o")),
    "attention": (nn.MultiHeadDotProductAttention(4), WIDE, ATTENTION),
    "lstm": (nn.RNN(nn.LSTMCell(8)), WIDE, under("cell", GATES)),
    "optimized lstm": (nn.RNN(nn.OptimizedLSTMCell(8)), WIDE, under("cell", GATES)),
    "gru": (nn.RNN(nn.GRUCell(8)), WIDE, under("cell", RESET)),
    "convolutional lstm": (nn.RNN(nn.ConvLSTMCell(8, (3, 3))), shape(2, 3, 8, 8, 4),
        under("cell/ih", "cell/hh", of("ssio[4]", "o[4]"))),
    "norms": (nn.Sequential(NORMS), WIDE,
        under("layers_0", "layers_2", "layers_3", NORM) | {"layers_1/scale": "o"}),
    "norm of two axes": (nn.LayerNorm(feature_axes=(-2, -1), reduction_axes=(-2, -1)), WIDE,
        {"scale": "oo", "bias": "oo"}),
    "weight norm": (nn.WeightNorm(nn.Dense(8)), WIDE,
        under("layer_instance", LINEAR | {"kernel/scale": "o"})),
    "share_scope": (LowRank(nn.Dense(8)), WIDE, LINEAR | under("a", "b", of("io"))),
    "lists": (Listed(), WIDE, under("layers_0", "layers_1", LINEAR)),
    "one layer": (Model(everything), WIDE, LAYER | {"gain": "o"}),
    # Numbers that are stacked are as many vectors of one entry.
    "scanned": (scan(everything, kind=nn.remat(Model)), WIDE, stack(LAYER) | {"gain": "o[3]"}),
    # As many layers as features: sizes do not tell which axis is which.
    "scanned, ambiguous": (scan(everything, 0, 16), WIDE, stack(LAYER) | {"gain": "o[16]"}),
    "scanned at the end": (scan(everything, -1, 16), WIDE, stack(LAYER, -1) | {"gain": "o[16]"}),
    "scanned in axis 1": (scan(square, 1, 16), WIDE, stack(SQUARE, 1)),
    "scanned, boxed": (scan(boxed, 1, 16, metadata_params={nn.PARTITION_NAME: "layers"}), WIDE,
        stack(SQUARE | {"gain": "o"}, 1)),
    "scanned twice": (twice(0), WIDE, under("layers", stack(SQUARE))),
    "scanned twice in axis -1": (twice(-1), WIDE, under("layers", stack(SQUARE, -1))),
    "scanned twice in axis -2": (twice(-2), WIDE, under("layers/Dense_0", of("ibo", "bo"))),
    "two vmaps": (vmap(vmap(nn.Dense, 1), 0)(4), shape(4, 4, 4), of("bibo", "bob")),
    "scan of vmap": (scan(experts), WIDE, stack(stack(under("Vmap_0", LINEAR)))),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    model, inputs, expected = LINEN[name]
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    loss = lambda params, x: squares(model.apply({"params": params}, x))  # noqa: E731
    assert read(loss, params, inputs) == expected


# NNX.


class Parts(nnx.Module):
    """Layers, and what is done with them."""

    def __init__(self, call, **parts):
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x):
        return self.call(self, x)


def gain(width):
    """A norm layer of the user's own, as Gemma has it."""
    return Parts(lambda m, x: x * (1 + m.scale[...]), scale=nnx.Param(jnp.zeros(width)))


class Block(nnx.Module):
    """About everything that NNX has."""

    def __init__(self, rngs, width=16):
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.LoRALinear(2 * width, width, lora_rank=2, rngs=rngs)
        self.heads = nnx.Einsum("btd,ndh->btnh", (2, width, 8), (2, 8), rngs=rngs)
        self.depthwise = nnx.Conv(width, width, 3, feature_group_count=width, rngs=rngs)
        self.own = gain(width)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        x = x + self.down(nnx.relu(self.up(self.own(x))))
        return x + self.heads(self.depthwise(x)).reshape(x.shape)


def axes(axis):
    return nnx.StateAxes({nnx.Param: axis, ...: 0})


def nnx_stack(make, size, axis=0):
    """Stacks layers as users do, with `nnx.vmap` over split keys."""

    @nnx.split_rngs(splits=size)
    @nnx.vmap(in_axes=0, out_axes=axes(axis))
    def stacked(rngs):
        return make(rngs)

    return stacked


def through(layers, x, axis=0, call=lambda layer, x: layer(x)):
    """Applies layers that are stacked, one after the other."""

    @nnx.scan(in_axes=(axes(axis), nnx.Carry), out_axes=nnx.Carry)
    def each(layer, x):
        return call(layer, x)

    return each(layers, x)


class Stack(nnx.Module):
    """Layers that are stacked, one after the other, or each for its own part of the input."""

    def __init__(self, rngs, make, size, axis=0, mapped=False):
        self.layers, self.axis, self.mapped = nnx_stack(make, size, axis)(rngs), axis, mapped

    def __call__(self, x):
        if self.mapped:
            return nnx.vmap(lambda f, x: f(x), in_axes=(axes(self.axis), 0))(self.layers, x)
        return through(self.layers, x, self.axis)


class Stacks(nnx.Module):
    """A stack of stacks."""

    def __init__(self, rngs, make, *sizes):
        self.layers = nnx_stack(nnx_stack(make, sizes[1]), sizes[0])(rngs)

    def __call__(self, x):
        return through(self.layers, x, call=through)


def linear(rngs):
    return nnx.Linear(4, 4, rngs=rngs)


def gated(rngs):
    cell = nnx.OptimizedLSTMCell(3, 3, rngs=rngs)
    call = lambda m, x: m.slope(m.own(m.cell((x, x), x)[1]))  # noqa: E731
    return Parts(call, cell=cell, own=gain(3), slope=nnx.PReLU())


def two(rngs):
    """A stack inside of a module that is none, and lists."""
    a, b, c = (nnx.Linear(3, 3, rngs=rngs) for _ in range(3))
    parts = {"layers": nnx.List([a, b]), "sequence": nnx.Sequential(c, nnx.PReLU())}
    call = lambda m, x: m.sequence(m.layers[1](m.layers[0](through(m.blocks, x))))  # noqa: E731
    return Parts(call, blocks=nnx_stack(gated, 3)(rngs), **parts)


def between(rngs):
    """Stacks along two axes with layers between them; all sizes are equal."""
    a = nnx_stack(lambda rngs: nnx.Linear(4, 4, use_bias=False, rngs=rngs), 4)(rngs)
    parts = {"b": linear(rngs), "c": nnx_stack(linear, 4, axis=1)(rngs), "d": linear(rngs)}
    return Parts(lambda m, x: m.d(through(m.c, m.b(through(m.a, x)), 1)), a=a, **parts)


def scaled(rngs):
    """A gain of the user's own beside a layer."""
    parts = {"linear": linear(rngs), "scale": nnx.Param(jnp.zeros(4))}
    return Parts(lambda m, x: m.linear(x) * m.scale[...], **parts)


def nested(rngs):
    """A stack two modules deep, beside a layer that is in none."""
    outer = nnx.Dict(blocks=nnx_stack(scaled, 3)(rngs), plain=linear(rngs))
    return Parts(lambda m, x: m.outer["plain"](through(m.outer["blocks"], x)), outer=outer)


def whole(rngs):
    """Queries, keys and values on an axis of their own."""
    qkv = nnx.Einsum("BTD,SNDH->SBTNH", (3, 4, 16, 8), (3, 4, 8), rngs=rngs)
    return Parts(lambda m, x: nnx.dot_product_attention(*m.qkv(x)), qkv=qkv)


def norm_layers(rngs):
    kinds = [nnx.LayerNorm, partial(nnx.GroupNorm, num_groups=4), nnx.InstanceNorm, nnx.BatchNorm]
    return nnx.Sequential(nnx.RMSNorm(8, rngs=rngs), *(kind(8, rngs=rngs) for kind in kinds))


def layer(kind, *args, **options):
    return lambda rngs: kind(*args, rngs=rngs, **options)


def recurrent(kind):
    return lambda rngs: nnx.RNN(kind(4, 8, rngs=rngs))


def both_directions(rngs):
    return nnx.Bidirectional(recurrent(nnx.GRUCell)(rngs), recurrent(nnx.GRUCell)(rngs))


BLOCK = {
    **under("attention", ATTENTION),
    **under("norm", NORM),
    **under("up", "down", LINEAR),
    **{"down/lora/lora_a": "io", "down/lora/lora_b": "io"},
    **under("heads", HEADS),
    **under("depthwise", of("sio[16]", "o")),
    "own/scale": "o",
}
FUSED = {"dense_i/kernel": "io[4]", "dense_h/kernel": "io[4]", "dense_h/bias": "o[4]"}
GRU = {"dense_i/kernel": "io[3]", "dense_h/kernel": "io[3]", "dense_i/bias": "o[3]"}
SIMPLE = {"dense_i/kernel": "io", "dense_i/bias": "o", "dense_h/kernel": "io"}
LSTM = under("ii", "if_", "ig", "io", of("io")) | under(*(f"h{gate}" for gate in "ifgo"), LINEAR)
LORA = {"lora/lora_a": "io", "lora/lora_b": "io"}
NNX = {
    "linear": (layer(nnx.Linear, 4, 8), ROWS, LINEAR),
    "general": (layer(nnx.LinearGeneral, (5, 4), (2, 3), axis=(-2, -1)), SEQUENCE,
        of("iioo", "oo")),
    "general with batch": (layer(nnx.LinearGeneral, 4, (2, 3), batch_axis={0: 5}), shape(5, 4),
        of("bioo", "boo")),
    "qkv apart": (whole, WIDE, under("qkv", of("boio", "boo"))),
    "conv": (layer(nnx.Conv, 4, 8, (3, 3)), IMAGE, CONV),
    "grouped conv": (layer(nnx.Conv, 4, 8, (3, 3), feature_group_count=2), IMAGE,
        of("ssio[2]", "o")),
    "conv transpose": (layer(nnx.ConvTranspose, 4, 8, 3), SEQUENCE, of("sio", "o")),
    "turned conv transpose": (
        layer(nnx.ConvTranspose, 4, 8, (3, 3), transpose_kernel=True), IMAGE, of("ssoi", "o")),
    "attention": (layer(nnx.MultiHeadAttention, 4, 16, decode=False), WIDE, ATTENTION),
    "lora": (layer(nnx.LoRALinear, 4, 8, lora_rank=2), ROWS, LINEAR | LORA),
    "lstm": (recurrent(nnx.LSTMCell), SEQUENCE, under("cell", LSTM)),
    "optimized lstm": (recurrent(nnx.OptimizedLSTMCell), SEQUENCE, under("cell", FUSED)),
    "gru": (both_directions, SEQUENCE, under("forward_rnn/cell", "backward_rnn/cell", GRU)),
    "simple cell": (recurrent(nnx.SimpleCell), SEQUENCE, under("cell", SIMPLE)),
    "norms": (norm_layers, shape(2, 5, 8),
        under(*(f"layers/{n}" for n in range(1, 5)), NORM) | {"layers/0/scale": "o"}),
    "spectral norm": (lambda rngs: nnx.SpectralNorm(nnx.Linear(4, 8, rngs=rngs), rngs=rngs), ROWS,
        under("layer_instance", LINEAR)),
    "one block": (Block, WIDE, BLOCK),
    "stack": (layer(Stack, make=Block, size=3), WIDE, under("layers", stack(BLOCK))),
    # As many layers as features.
    "ambiguous stack": (layer(Stack, make=Block, size=16), WIDE, under("layers", stack(BLOCK))),
    "stack in axis 1": (layer(Stack, make=Block, size=16, axis=1), WIDE,
        under("layers", stack(BLOCK, 1))),
    "mapped in axis 1": (layer(Stack, make=linear, size=4, axis=1, mapped=True), shape(4, 2, 4),
        under("layers", stack(LINEAR, 1))),
    "stacks apart": (between, ROWS,
        {"a/kernel": "bio"} | under("b", "d", LINEAR) | under("c", stack(LINEAR, 1))),
    "stack in a dictionary": (nested, ROWS, {
        **under("outer/blocks/linear", stack(LINEAR)),
        "outer/blocks/scale": "bo",
        **under("outer/plain", LINEAR)}),
    "stack of stacks": (lambda rngs: Stacks(rngs, linear, 4, 4), ROWS,
        under("layers", stack(stack(LINEAR)))),
    "stack of stacks of numbers": (lambda rngs: Stacks(rngs, lambda _: nnx.PReLU(), 2, 3), ROWS,
        {"layers/negative_slope": "bo[3]"}),
    "stack in a module": (two, shape(2, 3), {
        **under("blocks/cell", stack(FUSED)),
        "blocks/own/scale": "bo",
        "blocks/slope/negative_slope": "o[3]",
        **under("layers/0", "layers/1", "sequence/layers/0", LINEAR),
        "sequence/layers/1/negative_slope": "o"}),
}  # fmt: skip
# Those that keep keys or statistics beside their parameters are read as arrays, too.
WITH_STATES = ("simple cell", "norms", "spectral norm")


@pytest.mark.parametrize(
    ("name", "concrete"), [(n, False) for n in NNX] + [(n, True) for n in WITH_STATES]
)
def test_nnx(name, concrete):
    make, inputs, expected = NNX[name]
    model = make(nnx.Rngs(0)) if concrete else nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert read(lambda model, x: squares(model(x)), model, inputs) == expected


def test_weight_norm_of_nnx():
    layer = nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(0))
    model = nnx.WeightNorm(layer, feature_axes=(-2, -1), rngs=nnx.Rngs(0))
    expected = {"layer_instance/kernel": "ioo", "layer_instance/bias": "oo"}
    found = read(lambda model, x: squares(model(x)), model, ROWS)
    gains = found.keys() - expected.keys()  # which before Flax 0.12.4 are not parameters
    assert found == expected | dict.fromkeys(gains, "oo")
    assert len(gains) == len(jax.tree.leaves(nnx.state(model, nnx.Param))) - 2


# What a class is usually for says little about what a program does with its parameters.


def tied(_, tokens):
    """An embedding that is tied without `attend`."""
    embed = nn.Embed(12, 8, name="embed")
    return nn.LayerNorm(name="norm")(embed(tokens)) @ embed.embedding.T


class Turned(nn.Dense):
    """A dense layer that stores its kernel as (out, in)."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (self.features, x.shape[-1])).T


def detached(module, x):
    """A layer of its own inside, whose leaf has the name of one of the module's."""
    kernel = module.param("kernel", nn.initializers.normal(), (8, 16))
    inner = module.param("inner", nn.initializers.normal(), (8, 8))
    dense = nn.Dense(8, use_bias=False, parent=None)
    return dense.apply({"params": {"kernel": inner}}, nn.relu(x @ kernel.T))


def shared(_, tokens):
    """An embedding and a hidden kernel in one, which is therefore not the last layer."""
    embed = nn.Embed(8, 8, name="embed")
    return nn.Dense(3, name="head")(nn.relu(embed(tokens) @ embed.embedding))


TOKENS = shape(2, 5, dtype=jnp.int32)
MISLEADING = [
    (Model(tied), TOKENS, {"embed/embedding": "last oi", **under("norm", NORM)}),
    (Turned(8), WIDE, {"kernel": "last oi"}),
    (Model(detached), WIDE, {"kernel": "oi", "inner": "last io"}),
    (Model(shared), TOKENS, {"embed/embedding": "io", **under("head", of("last io", "o"))}),
]


@pytest.mark.parametrize(("model", "inputs", "expected"), MISLEADING)
def test_classes_mean_nothing(model, inputs, expected):
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]

    def loss(params, x):
        logits = model.apply({"params": params}, x)
        return cross_entropy(logits, jnp.argmax(logits, -1))

    assert read(loss, params, inputs, last=Sign()) == expected
