"""Every leaf of Linen's layers takes the step of the matrices that its layer computes with."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

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
SEQUENCE = jax.ShapeDtypeStruct((2, 5, 16), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)


class Layer(nn.Module):
    """A layer of a transformer, with about everything in it."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="norm")(x))
        gain = self.param("gain", nn.initializers.ones, ())
        x = x + gain * nn.Dense(16, name="down")(nn.WeightNorm(nn.Dense(16), name="up")(x))
        x = nn.Conv(16, (3,), feature_group_count=16, name="depthwise")(x)
        return x + nn.Einsum((2, 16, 8), "btd,ndh->btnh", name="heads")(x).reshape(x.shape), None


def layer(wrap):
    return {
        **under("attention", {path: wrap(view) for path, view in attention().items()}),
        "norm/scale": wrap(vector),
        "norm/bias": wrap(vector),
        "gain": wrap(vector),
        "Dense_0/kernel": wrap(dense),
        "Dense_0/bias": wrap(vector),
        "up/Dense_0/kernel/scale": wrap(vector),
        "down/kernel": wrap(dense),
        "down/bias": wrap(vector),
        "depthwise/kernel": (wrap(gates(16)), 3),
        "depthwise/bias": wrap(vector),
        "heads/kernel": wrap(per_head),
        "heads/bias": wrap(vector),
    }


def scan(module, axis, length=3, **options):
    split = {"params": True}
    return nn.scan(module, {"params": axis}, split_rngs=split, length=length, **options)


LSTM = {f"cell/i{gate}/kernel": dense for gate in "ifgo"}
LSTM |= {f"cell/h{gate}/kernel": dense for gate in "ifgo"}
LSTM |= {f"cell/h{gate}/bias": vector for gate in "ifgo"}
GRU = {f"cell/{side}{gate}/kernel": dense for side in "ih" for gate in "rzn"}
GRU |= {f"cell/{name}/bias": vector for name in ("ir", "iz", "in", "hn")}
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
        experts = nn.vmap(
            nn.Dense, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        return experts(16, name="Vmap_0")(x).sum(0), None


def vmap(module, axis):
    return nn.vmap(module, {"params": axis}, split_rngs={"params": True})


LINEN = {
    "dense": (nn.Dense(8), SEQUENCE, {"kernel": dense, "bias": vector}),
    "subclass": (Subclass(8), SEQUENCE, {"kernel": dense, "bias": vector}),
    "boxed": (nn.Dense(8, kernel_init=BOXED), SEQUENCE, {"kernel": dense, "bias": vector}),
    "logical": (nn.Dense(8, kernel_init=LOGICAL), SEQUENCE, {"kernel": dense, "bias": vector}),
    "general": (
        nn.DenseGeneral((2, 3), axis=(-2, -1)),
        SEQUENCE,
        {"kernel": lambda w: [w.reshape(80, 6).T], "bias": vector},
    ),
    "general with batch": (
        nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,)),
        SEQUENCE,
        {"kernel": stack(heads), "bias": stack(vector)},
    ),
    "qkv apart": (
        nn.Einsum((3, 4, 16, 8), "BTD,SNDH->SBTNH"),
        SEQUENCE,
        {"kernel": stack(per_head), "bias": stack(vector)},
    ),
    "merging einsum": (
        nn.Einsum((5, 16, 8), "btd,tdo->bo", use_bias=False),
        SEQUENCE,
        {"kernel": merge},
    ),
    "einsum without output": (
        nn.Einsum((16,), "btd,d->bt", False, kernel_init=nn.initializers.normal()),
        SEQUENCE,
        {"kernel": vector},
    ),
    "gain by einsum": (
        nn.Einsum((16,), "btd,d->btd", False, kernel_init=nn.initializers.normal()),
        SEQUENCE,
        {"kernel": vector},
    ),
    "called einsum": (
        Called(),
        SEQUENCE,
        {"einsum/kernel": per_head, "einsum/bias": vector},
    ),
    "conv": (nn.Conv(8, (3, 3)), IMAGE, {"kernel": (merge, 9), "bias": vector}),
    "conv 1d": (nn.Conv(8, (3,)), SEQUENCE, {"kernel": (merge, 3), "bias": vector}),
    "conv that is called like a gate": (
        nn.Conv(8, (3,), name="ih"),
        SEQUENCE,
        {"kernel": (merge, 3), "bias": vector},
    ),
    "grouped conv": (
        nn.Conv(8, (3, 3), feature_group_count=2),
        IMAGE,
        {"kernel": (gates(2), 9), "bias": vector},
    ),
    "local conv": (
        nn.ConvLocal(8, (3, 3), padding="VALID"),
        IMAGE,
        {"kernel": stack(stack(dense)), "bias": stack(stack(vector))},
    ),
    "conv transpose": (
        nn.ConvTranspose(8, (3, 3)),
        IMAGE,
        {"kernel": (merge, 9), "bias": vector},
    ),
    "conv transpose, transposed": (
        nn.ConvTranspose(8, (3, 3), transpose_kernel=True),
        IMAGE,
        {"kernel": (transposed, 9), "bias": vector},
    ),
    "attention": (nn.MultiHeadDotProductAttention(4), SEQUENCE, attention()),
    "lstm": (nn.RNN(nn.LSTMCell(8)), SEQUENCE, LSTM),
    "optimized lstm": (nn.RNN(nn.OptimizedLSTMCell(8)), SEQUENCE, LSTM),
    "gru": (nn.RNN(nn.GRUCell(8)), SEQUENCE, GRU),
    "convolutional lstm": (
        nn.RNN(nn.ConvLSTMCell(8, (3, 3))),
        jax.ShapeDtypeStruct((2, 3, 8, 8, 4), jnp.float32),
        {
            "cell/ih/kernel": (gates(4), 9),
            "cell/hh/kernel": (gates(4), 9),
            "cell/ih/bias": gates(4, vector),
            "cell/hh/bias": gates(4, vector),
        },
    ),
    "norms": (
        nn.Sequential([nn.LayerNorm(), nn.RMSNorm(), nn.GroupNorm(4), nn.InstanceNorm()]),
        SEQUENCE,
        {
            f"layers_{i}/{n}": vector
            for i in range(4)
            for n in ("scale", "bias")
            if (i, n) != (1, "bias")
        },
    ),
    "norm of two axes": (
        nn.LayerNorm(feature_axes=(-2, -1), reduction_axes=(-2, -1)),
        SEQUENCE,
        {"scale": vector, "bias": vector},
    ),
    "weight norm": (
        nn.WeightNorm(nn.Dense(8)),
        SEQUENCE,
        {
            "layer_instance/kernel": dense,
            "layer_instance/bias": vector,
            "layer_instance/kernel/scale": vector,
        },
    ),
    "share_scope": (
        LowRank(nn.Dense(8)),
        SEQUENCE,
        {"kernel": dense, "bias": vector, "a/kernel": dense, "b/kernel": dense},
    ),
    "lists": (
        Listed(),
        SEQUENCE,
        {f"layers_{i}/{n}": v for i in (0, 1) for n, v in (("kernel", dense), ("bias", vector))},
    ),
    "one layer": (Layer(), SEQUENCE, layer(lambda view: view)),
    "scanned": (scan(nn.remat(Layer), 0)(), SEQUENCE, layer(stack)),
    # As many layers as features: sizes do not tell which axis is which.
    "scanned, ambiguous": (scan(Layer, 0, 16)(), SEQUENCE, layer(stack)),
    "scanned at the end": (scan(Layer, -1, 16)(), SEQUENCE, layer(lambda v: stack_at(-1, v))),
    "scanned in axis 1": (
        scan(Square, 1, 16)(),
        SEQUENCE,
        {"Dense_0/kernel": stack_at(1, dense), "Dense_0/bias": stack_at(1, vector)},
    ),
    "scanned, boxed": (
        scan(Boxed, 1, 16, metadata_params={nn.PARTITION_NAME: "layers"})(),
        SEQUENCE,
        {
            "gain": stack_at(1, vector),
            "Dense_0/kernel": stack_at(1, dense),
            "Dense_0/bias": stack_at(1, vector),
        },
    ),
    **{
        f"scanned twice in axis {axis}": (
            Twice(axis),
            SEQUENCE,
            {
                "layers/Dense_0/kernel": stack_at(axis, dense),
                "layers/Dense_0/bias": stack_at(axis, vector),
            },
        )
        for axis in (0, -1, -2)
    },
    "two vmaps": (
        vmap(vmap(nn.Dense, 1), 0)(4),
        jax.ShapeDtypeStruct((4, 4, 4), jnp.float32),
        {"kernel": stack(stack_at(1, dense)), "bias": stack(stack_at(1, vector))},
    ),
    "scan of vmap": (
        scan(Experts, 0)(),
        SEQUENCE,
        {"Vmap_0/kernel": stack(stack(dense)), "Vmap_0/bias": stack(stack(vector))},
    ),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    model, inputs, expected = LINEN[name]
    norms, labels = flax_norms(model, inputs, hidden=HIDDEN, last={})
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    check(f"linen {name}", params, norms, labels, expected)
