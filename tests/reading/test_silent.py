"""What was once taken for something else without a word, by its class or by its rank."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from leaves import cross_entropy, of, read, shape, squares
from scion_jax import Sign
from scion_jax.reading import read_roles

pytestmark = pytest.mark.unoptimized


# By classes: what a class is usually for says little about what a program does with its parameters.


class Tied(nn.Module):
    """An embedding that is tied without `attend`."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(12, 8, name="embed")
        return nn.LayerNorm(name="norm")(embed(tokens)) @ embed.embedding.T


class Turned(nn.Dense):
    """A dense layer that stores its kernel as (out, in)."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (self.features, x.shape[-1])).T


class Detached(nn.Module):
    """A layer of its own inside, whose leaf has the name of one of the module's."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (8, 16))
        inner = self.param("inner", nn.initializers.normal(), (8, 8))
        dense = nn.Dense(8, use_bias=False, parent=None)
        return dense.apply({"params": {"kernel": inner}}, nn.relu(x @ kernel.T))


class Shared(nn.Module):
    """An embedding and a kernel in one."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(8, 8, name="embed")
        return nn.Dense(3, name="head")(nn.relu(embed(tokens) @ embed.embedding))


TOKENS, ROWS = shape(2, 5, dtype=jnp.int32), shape(2, 16)
CLASSES = {
    "tied without attend": (
        Tied(),
        TOKENS,
        {"embed/embedding": "last oi", "norm/scale": "o", "norm/bias": "o"},
    ),
    "a kernel that is transposed": (Turned(8), ROWS, {"kernel": "last oi"}),
    "a leaf of the same name": (Detached(), ROWS, {"kernel": "oi", "inner": "last io"}),
}


def table(model, inputs):
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]

    def loss(params, x):
        logits = model.apply({"params": params}, x)
        return cross_entropy(logits, jnp.argmax(logits, -1))

    return read(loss, params, inputs, last=Sign())


@pytest.mark.parametrize(("model", "inputs", "expected"), CLASSES.values(), ids=CLASSES)
def test_by_class(model, inputs, expected):
    assert table(model, inputs) == expected


def test_an_embedding_that_is_a_hidden_kernel_too_is_not_the_last_layer():
    assert not table(Shared(), TOKENS)["embed/embedding"].startswith("last")


# By rank.


def attend(w, x):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[n]) + w[f"{n}_bias"] for n in "qkv")
    return x + jnp.einsum("btnh,nhd->btd", jax.nn.dot_product_attention(q, k, v), w["out"])


def fused(w, x):
    q, k, v = jnp.einsum("btd,sndh->sbtnh", x, w["w"]) + w["bias"][:, None, None]
    return jax.nn.dot_product_attention(q, k, v)


def experts(w, x):
    chosen = jax.nn.softmax(x @ w["router"])
    y = jax.nn.relu(jnp.einsum("btd,edh->bteh", x, w["wi"]))
    return x + jnp.einsum("bteh,ehd,bte->btd", y, w["wo"], chosen)


def normalized(w, x):
    return jax.nn.standardize(x) * w["scale"] + w["bias"]


def convolve(spec, groups=1):
    def call(w, x):
        options = {"dimension_numbers": spec, "feature_group_count": groups}
        ones = (1,) * (x.ndim - 2)
        return jax.nn.relu(jax.lax.conv_general_dilated(x, w["kernel"], ones, "SAME", **options))

    return call


def scanned(layer):
    return lambda params, x: jax.lax.scan(lambda x, w: (layer(w, x), None), x, params)[0]


def einsum(equation):
    def call(w, x):
        y = jnp.einsum(equation, x, w["kernel"])
        return jax.nn.relu(y + w["bias"]) if "bias" in w else y

    return call


HEADS = dict.fromkeys("qkv", (32, 4, 8)) | {f"{n}_bias": (4, 8) for n in "qkv"}
HEADS |= {"out": (4, 8, 32)}
LAYOUTS = dict.fromkeys("qkv", "ioo") | {f"{n}_bias": "oo" for n in "qkv"} | {"out": "iio"}
SEQUENCE = (2, 5, 32)
RANKS = {
    "attention": (attend, HEADS, SEQUENCE, LAYOUTS),
    "scanned attention": (
        scanned(attend),
        {name: (3, *sizes) for name, sizes in HEADS.items()},
        SEQUENCE,
        {name: "b" + layout for name, layout in LAYOUTS.items()},
    ),
    "queries, keys, values apart": (
        fused,
        {"w": (3, 4, 32, 8), "bias": (3, 4, 8)},
        SEQUENCE,
        {"w": "boio", "bias": "boo"},
    ),
    "one axis to three": (
        einsum("ntd,dabc->ntabc"),
        {"kernel": (16, 3, 4, 8), "bias": (3, 4, 8)},
        (2, 5, 16),
        of("iooo", "ooo"),
    ),
    "two axes to three": (
        einsum("ntij,ijabc->ntabc"),
        {"kernel": (4, 8, 2, 3, 5)},
        (2, 5, 4, 8),
        of("iiooo"),
    ),
    "Gemma's queries": (einsum("btd,ndh->btnh"), {"kernel": (4, 32, 8)}, SEQUENCE, of("oio")),
    "scanned experts": (
        scanned(experts),
        {"wi": (3, 8, 16, 32), "wo": (3, 8, 32, 16), "router": (3, 16, 8)},
        (2, 5, 16),
        {"wi": "bbio", "wo": "bbio", "router": "bio"},
    ),
    "scanned convolution": (
        scanned(convolve(("NHWC", "HWIO", "NHWC"))),
        {"kernel": (3, 3, 3, 8, 8)},
        (2, 8, 8, 8),
        of("bssio"),
    ),
    "scanned convolution of rows": (
        scanned(convolve(("NWC", "WIO", "NWC"))),
        {"kernel": (3, 3, 32, 32)},
        SEQUENCE,
        of("bsio"),
    ),
    "depthwise convolution": (
        convolve(("NHWC", "HWIO", "NHWC"), 64),
        {"kernel": (3, 3, 1, 64)},
        (2, 8, 8, 64),
        of("ssio[64]"),
    ),
    "scanned norms": (
        scanned(normalized),
        {"scale": (3, 32), "bias": (3, 32)},
        SEQUENCE,
        {"scale": "bo", "bias": "bo"},
    ),
}


@pytest.mark.parametrize(("model", "params", "inputs", "expected"), RANKS.values(), ids=RANKS)
def test_by_rank(model, params, inputs, expected):
    params = {name: shape(*sizes) for name, sizes in params.items()}
    assert read(lambda p, x: squares(model(p, x)), params, shape(*inputs)) == expected


# What looked right until something else was beside it.


def gated(w, x):
    a, b = jnp.split(x @ w["gates"], 2, -1)
    return a * jax.nn.sigmoid(b)


def test_gates_whose_result_is_joined_with_something_else():
    params, x = {"gates": shape(4, 16)}, shape(2, 4)
    assert read(lambda w, x: squares(gated(w, x)), params, x) == {"gates": "io[2]"}

    def joined(w, x):
        return squares(jnp.concatenate([gated(w, x), x], -1))

    assert read(joined, params, x) == {"gates": "io[2]"}


def test_numbers_that_are_stacked_are_vectors_of_one_entry():
    model = scanned(lambda w, x: x * w["scale"])
    found = read(lambda w, x: squares(model(w, x)), {"scale": shape(3)}, shape(2, 4))
    assert found == {"scale": "o[3]"}


def test_mapped_experts_of_one_input_that_are_summed():
    def loss(w, x):
        return squares(jax.vmap(lambda kernel: x @ kernel)(w["kernel"]).sum(0))

    assert read(loss, {"kernel": shape(3, 4, 5)}, shape(2, 4)) == of("bio")


def test_one_trace_that_is_called_with_a_kernel_and_with_its_transpose():
    multiply = jax.jit(jnp.matmul)  # read once for both, were it not for the roles of the axes

    def loss(kernel, x):
        hidden = jnp.tanh(multiply(x, kernel))
        return jnp.mean(jnp.square(multiply(hidden, kernel.T) - x))

    (role,) = read_roles(loss, jnp.ones((5, 5)), jnp.ones((3, 5)))
    assert role.kind == "unknown"
    assert "disagree" in role.problem
