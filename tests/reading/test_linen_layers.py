"""Every leaf of Linen's layers, alone, scanned, mapped and wrapped."""

import jax
import pytest
from flax import linen as nn

from leaves import LINEAR, NORM, attention, of, read, shape, squares, stack, under

pytestmark = pytest.mark.unoptimized

SEQUENCE, IMAGE = shape(2, 5, 16), shape(2, 8, 8, 4)


class Layer(nn.Module):
    """A layer of a transformer, with about everything in it."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="norm")(x))
        gain = self.param("gain", nn.initializers.ones, ())
        x = x + gain * nn.Dense(16, name="down")(nn.WeightNorm(nn.Dense(16), name="up")(x))
        x = nn.Conv(16, (3,), feature_group_count=16, name="depthwise")(x)
        return x + nn.Einsum((2, 16, 8), "btd,ndh->btnh", name="heads")(x).reshape(x.shape), None


LAYER = {
    **under("attention", attention()),
    **under("norm", NORM),
    **under("Dense_0", LINEAR),
    "up/Dense_0/kernel/scale": "o",
    **under("down", LINEAR),
    "depthwise/kernel": "sio[16]",
    "depthwise/bias": "o",
    "heads/kernel": "oio",
    "heads/bias": "oo",
}
# A number for each layer: as many vectors of one entry.
NUMBERS = {3: {"gain": "o[3]"}, 16: {"gain": "o[16]"}}


def scan(module, axis, length=3, **options):
    split = {"params": True}
    return nn.scan(module, {"params": axis}, split_rngs=split, length=length, **options)


def vmap(module, axis, **options):
    return nn.vmap(module, {"params": axis}, split_rngs={"params": True}, **options)


LSTM = {f"{side}{gate}/kernel": "io" for side in "ih" for gate in "ifgo"}
LSTM |= {f"h{gate}/bias": "o" for gate in "ifgo"}
GRU = {f"{side}{gate}/kernel": "io" for side in "ih" for gate in "rzn"}
GRU |= {f"{name}/bias": "o" for name in ("ir", "iz", "in", "hn")}
BOXED = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
LOGICAL = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))


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
        for layer in self.layers:
            x = layer(x)
        return x


class Called(nn.Module):
    """Gives its equation when called."""

    @nn.compact
    def __call__(self, x):
        return nn.Einsum((2, 16, 8), name="einsum")(x, "btd,ndh->btnh")


class Apart(nn.Module):
    """Queries, keys and values on an axis of their own, which leads the result."""

    @nn.compact
    def __call__(self, x):
        return nn.dot_product_attention(*nn.Einsum((3, 4, 16, 8), "BTD,SNDH->SBTNH", name="qkv")(x))


class Square(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(x.shape[-1])(x), None


class Boxed(nn.Module):
    """Boxes, one of which the layer opens itself."""

    @nn.compact
    def __call__(self, x, _=None):
        ones = nn.with_partitioning(nn.initializers.ones, ("embed",))
        gain = self.param("gain", ones, x.shape[-1:], unbox=False)
        return nn.Dense(x.shape[-1], kernel_init=BOXED)(x * gain.value), None


class Twice(nn.Module):
    """Calls the same layers twice."""

    axis: int

    @nn.compact
    def __call__(self, x):
        layers = scan(Square, self.axis, 16)(name="layers")
        return layers(layers(x)[0])[0]


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        experts = vmap(nn.Dense, 0, in_axes=None, axis_size=2)
        return experts(16, name="Vmap_0")(x).sum(0), None


CONV = of("ssio", "o")
SQUARE = under("Dense_0", LINEAR)
NO_BIAS = {"use_bias": False, "kernel_init": nn.initializers.normal()}
LINEN = {
    "dense": (nn.Dense(8), SEQUENCE, LINEAR),
    "subclass": (Subclass(8), SEQUENCE, LINEAR),
    "boxed": (nn.Dense(8, kernel_init=BOXED), SEQUENCE, LINEAR),
    "logical": (nn.Dense(8, kernel_init=LOGICAL), SEQUENCE, LINEAR),
    "general": (nn.DenseGeneral((2, 3), axis=(-2, -1)), SEQUENCE, of("iioo", "oo")),
    "general with batch": (
        nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,)),
        SEQUENCE,
        of("bioo", "boo"),
    ),
    "qkv apart": (Apart(), SEQUENCE, {"qkv/kernel": "boio", "qkv/bias": "boo"}),
    "merging einsum": (nn.Einsum((5, 16, 8), "btd,tdo->bo", use_bias=False), SEQUENCE, of("iio")),
    "einsum without output": (nn.Einsum((16,), "btd,d->bt", **NO_BIAS), SEQUENCE, of("o")),
    "gain by einsum": (nn.Einsum((16,), "btd,d->btd", **NO_BIAS), SEQUENCE, of("o")),
    "gains by einsum": (nn.Einsum((5, 16), "btd,td->bt", **NO_BIAS), SEQUENCE, of("bo")),
    "heads that lead the result": (
        nn.Einsum((16, 2, 3), "btd,dnh->nhbt", use_bias=False),
        SEQUENCE,
        of("ioo"),
    ),
    "called einsum": (Called(), SEQUENCE, {"einsum/kernel": "oio", "einsum/bias": "oo"}),
    "conv": (nn.Conv(8, (3, 3)), IMAGE, CONV),
    "conv 1d": (nn.Conv(8, (3,)), SEQUENCE, of("sio", "o")),
    "conv that is called like a gate": (nn.Conv(8, (3,), name="ih"), SEQUENCE, of("sio", "o")),
    "grouped conv": (nn.Conv(8, (3, 3), feature_group_count=2), IMAGE, of("ssio[2]", "o")),
    "local conv": (nn.ConvLocal(8, (3, 3), padding="VALID"), IMAGE, of("bbio", "bbo")),
    "conv transpose": (nn.ConvTranspose(8, (3, 3)), IMAGE, CONV),
    "conv transpose, transposed": (
        nn.ConvTranspose(8, (3, 3), transpose_kernel=True),
        IMAGE,
        of("ssoi", "o"),
    ),
    "attention": (nn.MultiHeadDotProductAttention(4), SEQUENCE, attention()),
    "lstm": (nn.RNN(nn.LSTMCell(8)), SEQUENCE, under("cell", LSTM)),
    "optimized lstm": (nn.RNN(nn.OptimizedLSTMCell(8)), SEQUENCE, under("cell", LSTM)),
    "gru": (nn.RNN(nn.GRUCell(8)), SEQUENCE, under("cell", GRU)),
    "convolutional lstm": (
        nn.RNN(nn.ConvLSTMCell(8, (3, 3))),
        shape(2, 3, 8, 8, 4),
        {f"cell/{s}h/{n}": v for s in "ih" for n, v in (("kernel", "ssio[4]"), ("bias", "o[4]"))},
    ),
    "norms": (
        nn.Sequential([nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(4), nn.InstanceNorm()]),
        SEQUENCE,
        {
            **{f"layers_{i}/scale": "o" for i in range(4)},
            **{f"layers_{i}/bias": "o" for i in (0, 2, 3)},
        },
    ),
    "norm of two axes": (
        nn.LayerNorm(feature_axes=(-2, -1), reduction_axes=(-2, -1)),
        SEQUENCE,
        {"scale": "oo", "bias": "oo"},
    ),
    "weight norm": (
        nn.WeightNorm(nn.Dense(8)),
        SEQUENCE,
        under("layer_instance", LINEAR | {"kernel/scale": "o"}),
    ),
    "share_scope": (LowRank(nn.Dense(8)), SEQUENCE, {**LINEAR, "a/kernel": "io", "b/kernel": "io"}),
    "lists": (Listed(), SEQUENCE, {**under("layers_0", LINEAR), **under("layers_1", LINEAR)}),
    "one layer": (Layer(), SEQUENCE, LAYER | {"gain": "o"}),
    "scanned": (scan(nn.remat(Layer), 0)(), SEQUENCE, stack(LAYER) | NUMBERS[3]),
    # As many layers as features: sizes do not tell which axis is which.
    "scanned, ambiguous": (scan(Layer, 0, 16)(), SEQUENCE, stack(LAYER) | NUMBERS[16]),
    "scanned at the end": (scan(Layer, -1, 16)(), SEQUENCE, stack(LAYER, -1) | NUMBERS[16]),
    "scanned in axis 1": (scan(Square, 1, 16)(), SEQUENCE, stack(SQUARE, 1)),
    "scanned, boxed": (
        scan(Boxed, 1, 16, metadata_params={nn.PARTITION_NAME: "layers"})(),
        SEQUENCE,
        stack(SQUARE | {"gain": "o"}, 1),
    ),
    **{
        f"scanned twice in axis {axis}": (
            Twice(axis),
            SEQUENCE,
            under("layers", stack(SQUARE, axis)),
        )
        for axis in (0, -1)
    },
    "scanned twice in axis -2": (
        Twice(-2),
        SEQUENCE,
        {"layers/Dense_0/kernel": "ibo", "layers/Dense_0/bias": "bo"},
    ),
    "two vmaps": (vmap(vmap(nn.Dense, 1), 0)(4), shape(4, 4, 4), of("bibo", "bob")),
    "scan of vmap": (scan(Experts, 0)(), SEQUENCE, stack(stack(under("Vmap_0", LINEAR)))),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    model, inputs, expected = LINEN[name]
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    loss = lambda params, x: squares(model.apply({"params": params}, x))  # noqa: E731
    assert read(loss, params, inputs) == expected
