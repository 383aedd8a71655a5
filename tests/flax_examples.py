"""Small rebuilds of the models in Flax's own examples: gemma, lm1b, wmt, imagenet."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from flax_by_hand import attention, dense, merge, per_head, stack, under, vector

WIDTH = 16


def norm(name):
    return {f"{name}/scale": vector, f"{name}/bias": vector}


def linear(name, bias=True):
    return {f"{name}/kernel": dense, **({f"{name}/bias": vector} if bias else {})}


# gemma (NNX): einsums with the heads first, queries apart from keys and values, gains of one's own


class Scale(nnx.Module):
    """RMSNorm whose gain is 1 plus the parameter."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + self.scale[...])


class ScaledEmbed(nnx.Embed):
    def __call__(self, tokens):
        return super().__call__(tokens) * WIDTH**0.5


class GroupedAttention(nnx.Module):
    def __init__(self, heads, groups, rngs):
        self.q_einsum = nnx.Einsum("BTD,NDH->BTNH", (heads, WIDTH, 8), rngs=rngs)
        self.kv_einsum = nnx.Einsum("BTD,CKDH->CBTKH", (2, groups, WIDTH, 8), rngs=rngs)
        self.attn_vec_einsum = nnx.Einsum("BTNH,NHD->BTD", (heads, 8, WIDTH), rngs=rngs)
        self._query_norm, self._key_norm = Scale(8), Scale(8)

    def __call__(self, x):
        q, (k, v) = self._query_norm(self.q_einsum(x)), self.kv_einsum(x)
        return self.attn_vec_einsum(nnx.dot_product_attention(q, self._key_norm(k), v))


class GatedBlock(nnx.Module):
    def __init__(self, rngs):
        self.pre_norm = Scale(WIDTH)
        self.attn = GroupedAttention(4, 2, rngs)
        self.pre_ffw_norm = Scale(WIDTH)
        self.gate_proj = nnx.Linear(WIDTH, 32, use_bias=False, rngs=rngs)
        self.up_proj = nnx.Linear(WIDTH, 32, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(32, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.pre_norm(x))
        y = self.pre_ffw_norm(x)
        return x + self.down_proj(nnx.gelu(self.gate_proj(y)) * self.up_proj(y))


class Gemma(nnx.Module):
    def __init__(self, rngs):
        self.embedder = ScaledEmbed(20, WIDTH, rngs=rngs)
        self.layers = nnx.List([GatedBlock(rngs) for _ in range(2)])
        self.final_norm = Scale(WIDTH)

    def __call__(self, tokens):
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(self.final_norm(x))


GATED_BLOCK = {
    "attn/q_einsum/kernel": per_head,
    "attn/kv_einsum/kernel": stack(per_head),
    "attn/attn_vec_einsum/kernel": merge,
    "attn/_query_norm/scale": vector,
    "attn/_key_norm/scale": vector,
    "pre_norm/scale": vector,
    "pre_ffw_norm/scale": vector,
    "gate_proj/kernel": dense,
    "up_proj/kernel": dense,
    "down_proj/kernel": dense,
}
GEMMA = {
    **under("layers/0", GATED_BLOCK),
    **under("layers/1", GATED_BLOCK),
    "final_norm/scale": vector,
}


# lm1b and wmt (Linen): attention without biases, positions, embeddings shared and tied, boxes

logical = nn.with_logical_partitioning
KERNEL_INIT = logical(nn.initializers.xavier_uniform(), ("embed", "mlp"))
BIAS_INIT = logical(nn.initializers.normal(1e-6), ("mlp",))


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("pos_embedding", nn.initializers.normal(), (1, 5, WIDTH))


class Mlp(nn.Module):
    boxed: bool

    @nn.compact
    def __call__(self, x):
        inits = {"kernel_init": KERNEL_INIT, "bias_init": BIAS_INIT} if self.boxed else {}
        return nn.Dense(WIDTH, **inits)(nn.relu(nn.Dense(32, **inits)(x)))


class TransformerLayer(nn.Module):
    boxed: bool = False
    cross: bool = False

    @nn.compact
    def __call__(self, x, encoded=None):
        attend = partial(nn.MultiHeadDotProductAttention, num_heads=4, use_bias=False)
        x = x + attend()(nn.LayerNorm()(x))
        if self.cross:
            x = x + attend()(nn.LayerNorm()(x), encoded)
        return x + Mlp(self.boxed)(nn.LayerNorm()(x))


class LanguageModel(nn.Module):
    """lm1b."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(
            20, WIDTH, embedding_init=logical(nn.initializers.normal(), ("vocab", "embed"))
        )(tokens)
        x = Positions(name="posembed")(x)
        for index in range(2):
            x = TransformerLayer(boxed=True, name=f"block_{index}")(x)
        return nn.Dense(20, kernel_init=KERNEL_INIT, name="logitdense")(nn.LayerNorm()(x))


class Translation(nn.Module):
    """wmt."""

    def setup(self):
        self.shared_embedding = nn.Embed(20, WIDTH)
        self.encoder_block = TransformerLayer()
        self.decoder_block = TransformerLayer(cross=True)
        self.positions = Positions()
        self.norm = nn.LayerNorm()

    def __call__(self, inputs, targets):
        encoded = self.encoder_block(self.positions(self.shared_embedding(inputs)))
        decoded = self.decoder_block(self.positions(self.shared_embedding(targets)), encoded)
        return self.shared_embedding.attend(self.norm(decoded))


def transformer_layer(cross=False):
    parts = 2 if cross else 1
    kernels = {
        f"MultiHeadDotProductAttention_{index}/{path}": view
        for index in range(parts)
        for path, view in attention(bias=False).items()
    }
    norms = {k: v for index in range(parts + 1) for k, v in norm(f"LayerNorm_{index}").items()}
    return {**kernels, **norms, **linear("Mlp_0/Dense_0"), **linear("Mlp_0/Dense_1")}


LM1B = {
    **under("block_0", transformer_layer()),
    **under("block_1", transformer_layer()),
    **norm("LayerNorm_0"),
    **linear("logitdense"),
}
WMT = {
    **under("encoder_block", transformer_layer()),
    **under("decoder_block", transformer_layer(cross=True)),
    **norm("norm"),
}


# imagenet (Linen): a ResNet of bottlenecks, whose last gain in each block starts at 0


class Bottleneck(nn.Module):
    filters: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.strides)(y)))
        y = norm(scale_init=nn.initializers.zeros_init())(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (7, 7), 2, use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_init")(x))
        for filters, strides in ((4, 1), (8, 2)):
            x = Bottleneck(filters, strides, train)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def bottleneck():
    windows = {"Conv_0": 1, "Conv_1": 9, "Conv_2": 1, "conv_proj": 1}
    norms = [norm(name) for name in (*(f"BatchNorm_{i}" for i in range(3)), "norm_proj")]
    kernels = {f"{name}/kernel": (merge, window) for name, window in windows.items()}
    return {**kernels, **{path: view for views in norms for path, view in views.items()}}


RESNET = {
    "conv_init/kernel": (merge, 49),
    **norm("bn_init"),
    **under("Bottleneck_0", bottleneck()),
    **under("Bottleneck_1", bottleneck()),
    **linear("Dense_0"),
}
