"""Every leaf of NNX's layers takes the step of the matrices that its layer computes with."""

import jax.numpy as jnp
import pytest
from flax import nnx

from flax_by_hand import (
    attention,
    check,
    dense,
    gates,
    heads,
    merge,
    per_head,
    stack,
    stack_at,
    transposed,
    under,
    vector,
)
from scion_jax import ExactPolar, Spectral, flax_norms

pytestmark = pytest.mark.unoptimized

HIDDEN = Spectral(orthogonalizer=ExactPolar())


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


class Gain(nnx.Module):
    """A norm layer of the user's own, as Gemma has it."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.zeros(width))


def block(wrap):
    return {
        **under("attention", {path: wrap(view) for path, view in attention().items()}),
        "norm/scale": wrap(vector),
        "norm/bias": wrap(vector),
        "up/kernel": wrap(dense),
        "up/bias": wrap(vector),
        "down/kernel": wrap(dense),
        "down/bias": wrap(vector),
        "down/lora/lora_a": wrap(dense),
        "down/lora/lora_b": wrap(dense),
        "heads/kernel": wrap(per_head),
        "heads/bias": wrap(vector),
        "depthwise/kernel": (wrap(gates(16)), 3),
        "depthwise/bias": wrap(vector),
        "own/scale": wrap(vector),
    }


class Two(nnx.Module):
    """A stack inside of a module that is none, and lists."""

    def __init__(self, rngs):
        self.blocks = nnx_stack(Gated, 3)(rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.sequence = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.PReLU())


class Behind(nnx.Module):
    """A stack that does not come first, beside layers of its own that are in none."""

    def __init__(self, rngs, axis):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.layers = nnx_stack(lambda r: nnx.Linear(4, 3, rngs=r), 4, axis)(rngs)
        self.square = nnx.Linear(4, 4, rngs=rngs)


class Apart(nnx.Module):
    """Two stacks with a layer between them: what holds for one tells nothing about the other."""

    def __init__(self, rngs):
        self.a = nnx_stack(lambda r: nnx.Linear(4, 4, use_bias=False, rngs=r), 4)(rngs)
        self.b = nnx.Linear(4, 4, rngs=rngs)
        self.c = nnx_stack(lambda r: nnx.Linear(4, 3, rngs=r), 4, axis=1)(rngs)


class Scaled(nnx.Module):
    """A gain of the user's own beside a layer."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros(4))


class Nested(nnx.Module):
    """A stack two modules deep, beside a layer that is in none."""

    def __init__(self, rngs):
        self.outer = nnx.Dict(blocks=nnx_stack(Scaled, 3)(rngs), plain=nnx.Linear(4, 4, rngs=rngs))


class Gated(nnx.Module):
    def __init__(self, rngs):
        self.cell = nnx.OptimizedLSTMCell(3, 3, rngs=rngs)
        self.own = Gain(3)
        self.slope = nnx.PReLU()


def nnx_stack(make, size, axis=0, **options):
    """Stacks layers as users do, with `nnx.vmap` over split keys."""

    @nnx.split_rngs(splits=size)
    @nnx.vmap(in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}), **options)
    def stacked(rngs):
        return make(rngs)

    return stacked


LINEAR = {"kernel": dense, "bias": vector}
CELL = {"dense_i/kernel": gates(4), "dense_h/kernel": gates(4), "dense_h/bias": gates(4, vector)}
NNX = {
    "linear": (lambda r: nnx.Linear(4, 8, rngs=r), LINEAR),
    "general": (
        lambda r: nnx.LinearGeneral((5, 4), (2, 3), axis=(-2, -1), rngs=r),
        {"kernel": lambda w: [w.reshape(20, 6).T], "bias": vector},
    ),
    "general with batch": (
        lambda r: nnx.LinearGeneral(4, (2, 3), batch_axis={0: 5}, rngs=r),
        {"kernel": stack(heads), "bias": stack(vector)},
    ),
    "qkv apart": (
        lambda r: nnx.Einsum("BTD,SNDH->SBTNH", (3, 4, 16, 8), (3, 4, 8), rngs=r),
        {"kernel": stack(per_head), "bias": stack(vector)},
    ),
    "conv": (lambda r: nnx.Conv(4, 8, (3, 3), rngs=r), {"kernel": (merge, 9), "bias": vector}),
    "grouped conv": (
        lambda r: nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=r),
        {"kernel": (gates(2), 9), "bias": vector},
    ),
    "conv transpose": (
        lambda r: nnx.ConvTranspose(4, 8, 3, rngs=r),
        {"kernel": (merge, 3), "bias": vector},
    ),
    "conv transpose, transposed": (
        lambda r: nnx.ConvTranspose(4, 8, (3, 3), transpose_kernel=True, rngs=r),
        {"kernel": (transposed, 9), "bias": vector},
    ),
    "attention": (lambda r: nnx.MultiHeadAttention(4, 16, decode=False, rngs=r), attention()),
    "lora": (
        lambda r: nnx.LoRALinear(4, 8, lora_rank=2, rngs=r),
        {**LINEAR, "lora/lora_a": dense, "lora/lora_b": dense},
    ),
    "lstm": (
        lambda r: nnx.RNN(nnx.LSTMCell(4, 8, rngs=r)),
        {
            **{f"cell/i{g}/kernel": dense for g in ("i", "f_", "g", "o")},
            **{f"cell/h{g}/{n}": v for g in "ifgo" for n, v in LINEAR.items()},
        },
    ),
    "optimized lstm": (lambda r: nnx.RNN(nnx.OptimizedLSTMCell(4, 8, rngs=r)), under("cell", CELL)),
    "gru": (
        lambda r: nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(4, 8, rngs=r)), nnx.RNN(nnx.GRUCell(4, 8, rngs=r))
        ),
        {
            f"{side}_rnn/cell/{path}": view
            for side in ("forward", "backward")
            for path, view in {
                "dense_i/kernel": gates(3),
                "dense_h/kernel": gates(3),
                "dense_i/bias": gates(3, vector),
            }.items()
        },
    ),
    "simple cell": (
        lambda r: nnx.SimpleCell(4, 8, rngs=r),
        {"dense_i/kernel": dense, "dense_i/bias": vector, "dense_h/kernel": dense},
    ),
    "norms": (
        lambda r: nnx.Sequential(
            nnx.LayerNorm(8, rngs=r),
            nnx.RMSNorm(8, rngs=r),
            nnx.GroupNorm(8, 4, rngs=r),
            nnx.InstanceNorm(8, rngs=r),
            nnx.BatchNorm(8, rngs=r),
        ),
        {
            **{f"layers/{i}/scale": vector for i in range(5)},
            **{f"layers/{i}/bias": vector for i in (0, 2, 3, 4)},
        },
    ),
    "spectral norm": (
        lambda r: nnx.SpectralNorm(nnx.Linear(4, 8, rngs=r), rngs=r),
        under("layer_instance", LINEAR),
    ),
    "one block": (Block, block(lambda view: view)),
    "stack": (nnx_stack(Block, 3), block(stack)),
    # As many layers as features: sizes do not tell, so the axis is the leading one.
    "ambiguous stack": (nnx_stack(Block, 16), block(stack)),
    # But here the kernels of two sizes and the gates tell.
    "stack in axis 1": (nnx_stack(Block, 16, axis=1), block(lambda view: stack_at(1, view))),
    "stack behind other layers": (
        lambda r: Behind(r, 1),
        {
            **under("first", LINEAR),
            "layers/kernel": stack_at(1, dense),
            "layers/bias": stack_at(1, vector),
            **under("square", LINEAR),
        },
    ),
    "stack in a dictionary": (
        Nested,
        {
            "outer/blocks/linear/kernel": stack(dense),
            "outer/blocks/linear/bias": stack(vector),
            "outer/blocks/scale": stack(vector),
            **under("outer/plain", LINEAR),
        },
    ),
    "stacks apart": (
        Apart,
        {
            "a/kernel": stack(dense),
            **under("b", LINEAR),
            "c/kernel": stack_at(1, dense),
            "c/bias": stack_at(1, vector),
        },
    ),
    "stack of stacks": (
        nnx_stack(nnx_stack(lambda r: nnx.Linear(4, 4, rngs=r), 4), 4),
        {"kernel": stack(stack(dense)), "bias": stack(stack(vector))},
    ),
    "stack of stacks of scalars": (
        nnx_stack(nnx_stack(lambda _: nnx.PReLU(), 3), 2),
        {"negative_slope": stack(stack(vector))},
    ),
    "stack in a module": (
        Two,
        {
            **{f"blocks/cell/{path}": stack(view) for path, view in CELL.items()},
            "blocks/own/scale": stack(vector),
            "blocks/slope/negative_slope": stack(vector),
            **{f"layers/{i}/{n}": v for i in (0, 1) for n, v in LINEAR.items()},
            **under("sequence/layers/0", LINEAR),
            "sequence/layers/1/negative_slope": vector,
        },
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    make, expected = NNX[name]
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    norms, labels = flax_norms(model, hidden=HIDDEN, last={})
    check(f"nnx {name}", nnx.state(model, nnx.Param), norms, labels, expected)
