"""Small rebuilds of the models in Flax's own examples (gemma, lm1b, wmt, imagenet); tables."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from leaves import LINEAR, NORM, attention, under

WIDTH, VOCABULARY = 16, 20


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
        return self.attn_vec_einsum(jax.nn.dot_product_attention(q, self._key_norm(k), v))


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
        self.embedder = ScaledEmbed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([GatedBlock(rngs) for _ in range(2)])
        self.final_norm = Scale(WIDTH)

    def __call__(self, tokens):
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(self.final_norm(x))


GATED_BLOCK = {
    "attn/q_einsum/kernel": "oio",
    "attn/kv_einsum/kernel": "boio",
    "attn/attn_vec_einsum/kernel": "iio",
    "attn/_query_norm/scale": "o",
    "attn/_key_norm/scale": "o",
    "pre_norm/scale": "o",
    "pre_ffw_norm/scale": "o",
    "gate_proj/kernel": "io",
    "up_proj/kernel": "io",
    "down_proj/kernel": "io",
}
GEMMA = {
    "embedder/embedding": "last oi",
    **under("layers/0", GATED_BLOCK),
    **under("layers/1", GATED_BLOCK),
    "final_norm/scale": "o",
}


# lm1b and wmt (Linen): attention without biases, positions, embeddings shared and tied, boxes

logical = nn.with_logical_partitioning
KERNEL_INIT = logical(nn.initializers.xavier_uniform(), ("embed", "mlp"))
BIAS_INIT = logical(nn.initializers.normal(1e-6), ("mlp",))


class Positions(nn.Module):
    """A table of more positions than a text has."""

    @nn.compact
    def __call__(self, x):
        table = self.param("pos_embedding", nn.initializers.normal(), (1, 9, WIDTH))
        return x + table[:, : x.shape[1]]


class Mlp(nn.Module):
    boxed: bool
    dropout: float

    @nn.compact
    def __call__(self, x, train):
        inits = {"kernel_init": KERNEL_INIT, "bias_init": BIAS_INIT} if self.boxed else {}
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(nn.Dense(32, **inits)(x)))
        return nn.Dense(WIDTH, **inits)(x)


class TransformerLayer(nn.Module):
    boxed: bool = False
    cross: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, encoded=None, train=False):
        attend = partial(nn.MultiHeadDotProductAttention, num_heads=4, use_bias=False)
        x = x + attend()(nn.LayerNorm()(x))
        if self.cross:
            x = x + attend()(nn.LayerNorm()(x), encoded)
        return x + Mlp(self.boxed, self.dropout)(nn.LayerNorm()(x), train)


class LanguageModel(nn.Module):
    """lm1b."""

    @nn.compact
    def __call__(self, tokens, train=False):
        init = logical(nn.initializers.normal(), ("vocab", "embed"))
        x = Positions(name="posembed")(nn.Embed(VOCABULARY, WIDTH, embedding_init=init)(tokens))
        for index in range(2):
            x = TransformerLayer(boxed=True, dropout=0.1, name=f"block_{index}")(x, train=train)
        return nn.Dense(VOCABULARY, kernel_init=KERNEL_INIT, name="logitdense")(nn.LayerNorm()(x))


class Translation(nn.Module):
    """wmt."""

    def setup(self):
        self.shared_embedding = nn.Embed(VOCABULARY, WIDTH)
        self.encoder_block = TransformerLayer()
        self.decoder_block = TransformerLayer(cross=True)
        self.positions = Positions()
        self.norm = nn.LayerNorm()

    def __call__(self, inputs, targets):
        encoded = self.encoder_block(self.positions(self.shared_embedding(inputs)))
        decoded = self.decoder_block(self.positions(self.shared_embedding(targets)), encoded)
        return self.shared_embedding.attend(self.norm(decoded))


def transformer_layer(cross=False):
    table = under("Mlp_0/Dense_0", LINEAR) | under("Mlp_0/Dense_1", LINEAR)
    for index in range(2 if cross else 1):
        table |= under(f"MultiHeadDotProductAttention_{index}", attention(bias=False))
    for index in range(3 if cross else 2):
        table |= under(f"LayerNorm_{index}", NORM)
    return table


LM1B = {
    "Embed_0/embedding": "embedding io",
    "posembed/pos_embedding": "boo",
    **under("block_0", transformer_layer()),
    **under("block_1", transformer_layer()),
    **under("LayerNorm_0", NORM),
    "logitdense/kernel": "last io",
    "logitdense/bias": "o",
}
WMT = {
    "shared_embedding/embedding": "last oi",
    "positions/pos_embedding": "boo",
    **under("encoder_block", transformer_layer()),
    **under("decoder_block", transformer_layer(cross=True)),
    **under("norm", NORM),
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


BOTTLENECK = {
    **{f"{name}/kernel": "ssio" for name in ("Conv_0", "Conv_1", "Conv_2", "conv_proj")},
    **{
        f"{name}/{part}": layout
        for name in ("BatchNorm_0", "BatchNorm_1", "BatchNorm_2", "norm_proj")
        for part, layout in NORM.items()
    },
}
RESNET = {
    "conv_init/kernel": "ssio",
    **under("bn_init", NORM),
    **under("Bottleneck_0", BOTTLENECK),
    **under("Bottleneck_1", BOTTLENECK),
    "Dense_0/kernel": "last io",
    "Dense_0/bias": "o",
}
