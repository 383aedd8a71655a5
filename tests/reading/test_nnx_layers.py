"""Every leaf of NNX's layers, alone, stacked along any axis, and in containers."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from leaves import LINEAR, NORM, attention, of, read, shape, squares, stack, under

pytestmark = pytest.mark.unoptimized


class Gain(nnx.Module):
    """A norm layer of the user's own, as Gemma has it."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        return x * (1 + self.scale[...])


class Block(nnx.Module):
    """About everything that NNX has."""

    def __init__(self, rngs, width=16):
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.LoRALinear(2 * width, width, lora_rank=2, rngs=rngs)
        self.heads = nnx.Einsum("btd,ndh->btnh", (2, width, 8), (2, 8), rngs=rngs)
        self.depthwise = nnx.Conv(width, width, 3, feature_group_count=width, rngs=rngs)
        self.own = Gain(width)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        x = x + self.down(nnx.relu(self.up(self.own(x))))
        return x + self.heads(self.depthwise(x)).reshape(x.shape)


BLOCK = {
    **under("attention", attention()),
    **under("norm", NORM),
    **under("up", LINEAR),
    **under("down", LINEAR | {"lora/lora_a": "io", "lora/lora_b": "io"}),
    "heads/kernel": "oio",
    "heads/bias": "oo",
    "depthwise/kernel": "sio[16]",
    "depthwise/bias": "o",
    "own/scale": "o",
}


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


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.cell = nnx.OptimizedLSTMCell(3, 3, rngs=rngs)
        self.own = Gain(3)
        self.slope = nnx.PReLU()

    def __call__(self, x):
        return self.slope(self.own(self.cell((x, x), x)[1]))


class Two(nnx.Module):
    """A stack inside of a module that is none, and lists."""

    def __init__(self, rngs):
        self.blocks = nnx_stack(Gated, 3)(rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.sequence = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.PReLU())

    def __call__(self, x):
        x = through(self.blocks, x)
        for layer in self.layers:
            x = layer(x)
        return self.sequence(x)


class Apart(nnx.Module):
    """Stacks along two axes with layers between them; all sizes are equal."""

    def __init__(self, rngs):
        self.a = nnx_stack(lambda r: nnx.Linear(4, 4, use_bias=False, rngs=r), 4)(rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)
        self.c = nnx_stack(lambda r: nnx.Linear(4, 4, rngs=r), 4, axis=1)(rngs)
        self.d = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.d(through(self.c, self.b(through(self.a, x)), 1))


class Scaled(nnx.Module):
    """A gain of the user's own beside a layer."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(4))

    def __call__(self, x):
        return self.linear(x) * self.scale[...]


class Nested(nnx.Module):
    """A stack two modules deep, beside a layer that is in none."""

    def __init__(self, rngs):
        self.outer = nnx.Dict(blocks=nnx_stack(Scaled, 3)(rngs), plain=nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x):
        return self.outer["plain"](through(self.outer["blocks"], x))


def stack_of_stacks(make, sizes):
    """A stack of stacks, as a model of its own."""

    class Stacks(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx_stack(nnx_stack(make, sizes[1]), sizes[0])(rngs)

        def __call__(self, x):
            return through(self.layers, x, call=through)

    return Stacks


def linear(rngs):
    return nnx.Linear(4, 4, rngs=rngs)


def qkv(model, x):
    return nnx.dot_product_attention(*model(x))


def cell(model, x):
    return model(model.initialize_carry(x.shape, nnx.Rngs(0)), x)


GATES = {"dense_i/kernel": "io[4]", "dense_h/kernel": "io[4]", "dense_h/bias": "o[4]"}
GRU = {"dense_i/kernel": "io[3]", "dense_h/kernel": "io[3]", "dense_i/bias": "o[3]"}
LSTM = {f"i{gate}/kernel": "io" for gate in ("i", "f_", "g", "o")}
LSTM |= {path: layout for gate in "ifgo" for path, layout in under(f"h{gate}", LINEAR).items()}
SEQUENCE, IMAGE, VECTORS = shape(2, 5, 4), shape(2, 8, 8, 4), shape(2, 4)
CONV = of("ssio", "o")
NNX = {
    "linear": (lambda r: nnx.Linear(4, 8, rngs=r), VECTORS, LINEAR),
    "general": (
        lambda r: nnx.LinearGeneral((5, 4), (2, 3), axis=(-2, -1), rngs=r),
        SEQUENCE,
        of("iioo", "oo"),
    ),
    "general with batch": (
        lambda r: nnx.LinearGeneral(4, (2, 3), batch_axis={0: 5}, rngs=r),
        shape(5, 4),
        of("bioo", "boo"),
    ),
    "qkv apart": (
        lambda r: nnx.Einsum("BTD,SNDH->SBTNH", (3, 4, 16, 8), (3, 4, 8), rngs=r),
        shape(2, 5, 16),
        of("boio", "boo"),
        qkv,
    ),
    "conv": (lambda r: nnx.Conv(4, 8, (3, 3), rngs=r), IMAGE, CONV),
    "grouped conv": (
        lambda r: nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=r),
        IMAGE,
        of("ssio[2]", "o"),
    ),
    "conv transpose": (lambda r: nnx.ConvTranspose(4, 8, 3, rngs=r), SEQUENCE, of("sio", "o")),
    "conv transpose, transposed": (
        lambda r: nnx.ConvTranspose(4, 8, (3, 3), transpose_kernel=True, rngs=r),
        IMAGE,
        of("ssoi", "o"),
    ),
    "attention": (
        lambda r: nnx.MultiHeadAttention(4, 16, decode=False, rngs=r),
        shape(2, 5, 16),
        attention(),
    ),
    "lora": (
        lambda r: nnx.LoRALinear(4, 8, lora_rank=2, rngs=r),
        VECTORS,
        {**LINEAR, "lora/lora_a": "io", "lora/lora_b": "io"},
    ),
    "lstm": (lambda r: nnx.RNN(nnx.LSTMCell(4, 8, rngs=r)), SEQUENCE, under("cell", LSTM)),
    "optimized lstm": (
        lambda r: nnx.RNN(nnx.OptimizedLSTMCell(4, 8, rngs=r)),
        SEQUENCE,
        under("cell", GATES),
    ),
    "gru": (
        lambda r: nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(4, 8, rngs=r)), nnx.RNN(nnx.GRUCell(4, 8, rngs=r))
        ),
        SEQUENCE,
        {**under("forward_rnn/cell", GRU), **under("backward_rnn/cell", GRU)},
    ),
    "simple cell": (
        lambda r: nnx.RNN(nnx.SimpleCell(4, 8, rngs=r)),
        SEQUENCE,
        under("cell", {"dense_i/kernel": "io", "dense_i/bias": "o", "dense_h/kernel": "io"}),
    ),
    "norms": (
        lambda r: nnx.Sequential(
            nnx.LayerNorm(8, rngs=r),
            nnx.RMSNorm(8, rngs=r),
            nnx.GroupNorm(8, 4, rngs=r),
            nnx.InstanceNorm(8, rngs=r),
            nnx.BatchNorm(8, rngs=r),
        ),
        shape(2, 5, 8),
        {
            **{f"layers/{i}/scale": "o" for i in range(5)},
            **{f"layers/{i}/bias": "o" for i in (0, 2, 3, 4)},
        },
    ),
    "spectral norm": (
        lambda r: nnx.SpectralNorm(nnx.Linear(4, 8, rngs=r), rngs=r),
        VECTORS,
        under("layer_instance", LINEAR),
    ),
    "one block": (Block, shape(2, 5, 16), BLOCK),
    "stack": (lambda r: Stack(r, Block, 3), shape(2, 5, 16), under("layers", stack(BLOCK))),
    # As many layers as features.
    "ambiguous stack": (
        lambda r: Stack(r, Block, 16),
        shape(2, 5, 16),
        under("layers", stack(BLOCK)),
    ),
    "stack in axis 1": (
        lambda r: Stack(r, Block, 16, axis=1),
        shape(2, 5, 16),
        under("layers", stack(BLOCK, 1)),
    ),
    "mapped in axis 1": (
        lambda r: Stack(r, lambda r: nnx.Linear(4, 6, rngs=r), 4, axis=1, mapped=True),
        shape(4, 2, 4),
        under("layers", stack(LINEAR, 1)),
    ),
    "stacks apart": (
        Apart,
        VECTORS,
        {
            "a/kernel": "bio",
            **under("b", LINEAR),
            **under("c", stack(LINEAR, 1)),
            **under("d", LINEAR),
        },
    ),
    "stack in a dictionary": (
        Nested,
        VECTORS,
        {
            **under("outer/blocks/linear", stack(LINEAR)),
            "outer/blocks/scale": "bo",
            **under("outer/plain", LINEAR),
        },
    ),
    "stack of stacks": (
        stack_of_stacks(linear, (4, 4)),
        VECTORS,
        under("layers", stack(stack(LINEAR))),
    ),
    # Numbers that are stacked are as many vectors of one entry.
    "stack of stacks of scalars": (
        stack_of_stacks(lambda _: nnx.PReLU(), (2, 3)),
        VECTORS,
        {"layers/negative_slope": "bo[3]"},
    ),
    "stack in a module": (
        Two,
        shape(2, 3),
        {
            **under("blocks/cell", stack(GATES)),
            "blocks/own/scale": "bo",
            "blocks/slope/negative_slope": "o[3]",
            **under("layers/0", LINEAR),
            **under("layers/1", LINEAR),
            **under("sequence/layers/0", LINEAR),
            "sequence/layers/1/negative_slope": "o",
        },
    ),
}
# Which keep keys or statistics beside their parameters.
WITH_STATES = ("lstm", "optimized lstm", "gru", "simple cell", "norms", "spectral norm")


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, inputs, expected, *own = NNX[name]
    call = own[0] if own else lambda model, x: model(x)
    shapes = name not in WITH_STATES
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0))) if shapes else make(nnx.Rngs(0))
    assert read(lambda model, x: squares(call(model, x)), model, inputs) == expected


@pytest.mark.parametrize("name", ["simple cell", "norms", "spectral norm"])
def test_abstract_models_with_states_beside_their_parameters(name):
    make, inputs, expected = NNX[name]
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    assert read(lambda model, x: squares(model(x)), model, inputs) == expected


def test_weight_norm():
    layer = nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(0))
    model = nnx.WeightNorm(layer, feature_axes=(-2, -1), rngs=nnx.Rngs(0))
    expected = {"layer_instance/kernel": "ioo", "layer_instance/bias": "oo"}
    found = read(lambda model, x: squares(model(x)), model, VECTORS)
    gains = found.keys() - expected.keys()  # which before Flax 0.12.4 are not parameters
    assert found == expected | dict.fromkeys(gains, "oo")
    assert len(gains) == len(jax.tree.leaves(nnx.state(model, nnx.Param))) - 2
