"""Small rebuilds of the models in Flax's own examples, with the losses they are trained with."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from scion_jax import Sign, infer_norms
from tests.reading.support import ATTENTION, LINEAR, NORM, cross_entropy, of, read, shape, under

pytestmark = pytest.mark.unoptimized

WIDTH, VOCABULARY, TOKENS = 16, 20, shape(2, 5, dtype=jnp.int32)
LAST = Sign(30.0, zero_init=True)


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
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.pre_norm, self.pre_ffw_norm = Scale(WIDTH), Scale(WIDTH)
        self.attn = GroupedAttention(4, 2, rngs)
        self.gate_proj, self.up_proj = linear(WIDTH, 32), linear(WIDTH, 32)
        self.down_proj = linear(32, WIDTH)

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
    **under("attn/_query_norm", "attn/_key_norm", "pre_norm", "pre_ffw_norm", {"scale": "o"}),
    **under("gate_proj", "up_proj", "down_proj", of("io")),
}
GEMMA = {"embedder/embedding": "last oi", "final_norm/scale": "o"}
GEMMA |= under("layers/0", "layers/1", GATED_BLOCK)


def of_gemma(model, tokens):
    return cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])


def test_gemma():
    model = nnx.eval_shape(lambda: Gemma(nnx.Rngs(0)))
    assert read(of_gemma, model, TOKENS, last=LAST) == GEMMA
    assert read(of_gemma, model, TOKENS)["embedder/embedding"] == "embedding io"
    norms = infer_norms(of_gemma, model, TOKENS, last=LAST).norms
    assert norms["last oi"] == Sign(30.0, layout="oi")  # an embedding does not start at zero


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
        self.encoder_block, self.decoder_block = TransformerLayer(), TransformerLayer(cross=True)
        self.positions, self.norm = Positions(), nn.LayerNorm()

    def __call__(self, inputs, targets):
        encoded = self.encoder_block(self.positions(self.shared_embedding(inputs)))
        decoded = self.decoder_block(self.positions(self.shared_embedding(targets)), encoded)
        return self.shared_embedding.attend(self.norm(decoded))


def transformer_layer(attentions):
    heads = {path: layout for path, layout in ATTENTION.items() if path.endswith("kernel")}
    return {
        **under("Mlp_0/Dense_0", "Mlp_0/Dense_1", LINEAR),
        **under(*(f"MultiHeadDotProductAttention_{n}" for n in range(attentions)), heads),
        **under(*(f"LayerNorm_{n}" for n in range(attentions + 1)), NORM),
    }


LM1B = {
    "Embed_0/embedding": "embedding io",
    "posembed/pos_embedding": "boo",
    **under("block_0", "block_1", transformer_layer(1)),
    **under("LayerNorm_0", NORM),
    **under("logitdense", of("last io", "o")),
}
WMT = {
    "shared_embedding/embedding": "last oi",
    "positions/pos_embedding": "boo",
    **under("encoder_block", transformer_layer(1)),
    **under("decoder_block", transformer_layer(2)),
    **under("norm", NORM),
}


def variables(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def test_lm1b():
    model = LanguageModel()

    def loss(params, tokens, dropout):
        logits = model.apply({"params": params}, tokens, train=True, rngs={"dropout": dropout})
        return cross_entropy(logits[:, :-1], tokens[:, 1:])

    params = variables(model, TOKENS)["params"]
    assert read(loss, params, TOKENS, jax.random.key(1), last=LAST) == LM1B


def test_wmt():
    model = Translation()

    def loss(params, inputs, targets):
        return cross_entropy(model.apply(params, inputs, targets)[:, :-1], targets[:, 1:])

    params = variables(model, TOKENS, TOKENS)
    assert read(loss, params, TOKENS, TOKENS, last=LAST) == WMT


# imagenet (Linen): a ResNet of bottlenecks, whose last gain in each block starts at 0


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="bn_init")(conv(8, (7, 7), 2, name="conv_init")(x)))
        for filters, strides in ((4, 1), (8, 2)):
            y = nn.relu(norm()(conv(filters, (1, 1))(x)))
            y = nn.relu(norm()(conv(filters, (3, 3), strides)(y)))
            y = norm(scale_init=nn.initializers.zeros_init())(conv(4 * filters, (1, 1))(y))
            x = nn.relu(norm()(conv(4 * filters, (1, 1), strides)(x)) + y)
        return nn.Dense(10)(x.mean((1, 2)))


RESNET = {
    **under("conv_init", *(f"Conv_{n}" for n in range(8)), of("ssio")),
    **under("bn_init", *(f"BatchNorm_{n}" for n in range(8)), NORM),
    **under("Dense_0", of("last io", "o")),
}


def test_imagenet():
    model, images = ResNet(), shape(2, 16, 16, 3)

    def loss(params, statistics, images, classes):
        both = {"params": params, "batch_stats": statistics}
        logits, changed = model.apply(both, images, mutable=["batch_stats"])
        return cross_entropy(logits, classes), changed

    both = variables(model, images)
    inputs = both["batch_stats"], images, shape(2, dtype=jnp.int32)
    assert read(loss, both["params"], *inputs, last=LAST, has_aux=True) == RESNET
