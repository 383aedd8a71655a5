"""Attention's heads, each a matrix of its own: in every form of attention, and in nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from scion_jax import ExactPolar, Spectral, infer_norms
from scion_jax.reading import read_roles
from tests.reading.support import ATTENTION, of, read, shape, squares, stack, under

pytestmark = pytest.mark.unoptimized

BATCH, TIME, WIDTH, HEADS, SIZE, KEYS = 2, 5, 8, 4, 6, 2
SEQUENCE = shape(BATCH, TIME, WIDTH)
GROUP = HEADS // KEYS


def normal(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def rotated(x):
    """Rotary embeddings, of halves that are put together again."""
    angles = jnp.arange(x.shape[1], dtype=float)[:, None, None] * jnp.ones(x.shape[-1] // 2)
    a, b = jnp.split(x, 2, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attended(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def split(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)


def plain(p, x):
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) + p[f"{n} bias"] for n in "qkv")
    return x + jnp.einsum("bqhd,hde->bqe", attended(normal(q) * p["gain"], rotated(k), v), p["out"])


PLAIN = {
    **{n: shape(WIDTH, HEADS, SIZE) for n in "qkv"},
    **{f"{n} bias": shape(HEADS, SIZE) for n in "qkv"},
    "gain": shape(SIZE),
    "out": shape(HEADS, SIZE, WIDTH),
}
PLAIN_APART = dict.fromkeys("qkv", "ibo") | dict.fromkeys(("q bias", "k bias", "v bias"), "bo")
PLAIN_APART |= {"gain": "o", "out": "bio"}


def of_flat_matrices(p, x):
    q, k, v = (split(x @ p[n] + p[f"{n} bias"], HEADS) for n in "qkv")
    return x + attended(rotated(q), k, v).reshape(BATCH, TIME, -1) @ p["out"]


def in_batches_of_heads(p, x):
    """Batch and heads on one axis, as PyTorch's code has them."""

    def flat(x):
        return split(x, HEADS).swapaxes(1, 2).reshape(BATCH * HEADS, TIME, SIZE)

    q, k, v = (flat(x @ p[n]) for n in "qkv")
    x = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v
    return x.reshape(BATCH, HEADS, TIME, SIZE).swapaxes(1, 2).reshape(BATCH, TIME, -1) @ p["out"]


FLAT = {**{n: shape(WIDTH, HEADS * SIZE) for n in "qkv"}, "out": shape(HEADS * SIZE, WIDTH)}
FLAT_APART = {**dict.fromkeys("qkv", "io[4]"), "out": "i[4]o"}


def fused(p, x):
    q, k, v = (split(part, HEADS) for part in jnp.split(x @ p["qkv"] + p["bias"], 3, -1))
    return x + jax.nn.dot_product_attention(q, k, v).reshape(BATCH, TIME, -1) @ p["out"]


def fused_on_an_axis(p, x):
    q, k, v = jnp.einsum("bte,eshd->sbthd", x, p["qkv"])
    return jnp.einsum("bthd,hde->bte", jax.nn.dot_product_attention(q, k, v), p["out"])


def beside_a_perceptron(p, x):
    """Queries, keys, values and hidden units of one product; the latter have no heads."""
    qkv, hidden = jnp.split(x @ p["in"], [3 * HEADS * SIZE], -1)
    q, k, v = (split(part, HEADS) for part in jnp.split(qkv, 3, -1))
    return attended(q, k, v).reshape(BATCH, TIME, -1) @ p["out"] + jax.nn.relu(hidden) @ p["down"]


def grouped(p, x):
    """Each key serves a group of queries, of which it is no batch axis."""
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) for n in "qkv")
    q = rotated(q).reshape(BATCH, TIME, KEYS, GROUP, SIZE)
    weights = jax.nn.softmax(jnp.einsum("bqkgd,bskd->bkgqs", q, rotated(k)))
    x = jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(BATCH, TIME, HEADS, SIZE)
    return jnp.einsum("bqhd,hde->bqe", x, p["out"])


GROUPED = PLAIN | {n: shape(WIDTH, KEYS, SIZE) for n in "kv"}
GROUPED = {name: GROUPED[name] for name in ("q", "k", "v", "out")}
GROUPED_APART = {name: PLAIN_APART[name] for name in GROUPED}


def grouped_of_flat_matrices(p, x):
    q, k, v = (split(x @ p[n], heads) for n, heads in (("q", HEADS), ("k", KEYS), ("v", KEYS)))
    q = normal(q).reshape(BATCH, TIME, KEYS, GROUP, SIZE)
    weights = jax.nn.softmax(jnp.einsum("bqkgd,bskd->bkgqs", q, rotated(k)))
    return jnp.einsum("bkgqs,bskd->bqkgd", weights, v).reshape(BATCH, TIME, -1) @ p["out"]


def with_repeated_keys(p, x):
    q, k, v = (split(x @ p[n], heads) for n, heads in (("q", HEADS), ("k", KEYS), ("v", KEYS)))
    x = attended(rotated(q), *(jnp.repeat(y, GROUP, axis=2) for y in (rotated(k), v)))
    return x.reshape(BATCH, TIME, -1) @ p["out"]


def grouped_and_fused(p, x):
    sizes = [HEADS * SIZE, (HEADS + KEYS) * SIZE]
    q, k, v = jnp.split(x @ p["qkv"], sizes, -1)
    q, k, v = split(q, HEADS), split(k, KEYS), split(v, KEYS)
    return jax.nn.dot_product_attention(q, k, v).reshape(BATCH, TIME, -1) @ p["out"]


def interleaved(p, x):
    """Each key with its value and its queries: they stay together, as a strided cut is no part."""
    x = split(x @ p["qkv"], KEYS).reshape(BATCH, TIME, KEYS, GROUP + 2, SIZE)
    q, k, v = x[..., :GROUP, :].reshape(BATCH, TIME, HEADS, SIZE), x[..., GROUP, :], x[..., -1, :]
    return jax.nn.dot_product_attention(q, k, v).reshape(BATCH, TIME, -1) @ p["out"]


def of_one_key(p, x):
    """Multi-query attention: no axis of heads is a batch axis."""
    q, k, v = jnp.einsum("bte,ehd->bthd", x, p["q"]), x @ p["k"], x @ p["v"]
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkd->bhqk", q, k))
    return jnp.einsum("bhqk,bkd->bqhd", weights, v).reshape(BATCH, TIME, -1) @ p["out"]


RANK, ROTARY, VALUE = 3, 4, 5


def latent(p, x):
    """DeepSeek's: down to latents and up to heads, with a part of the keys that all heads share."""
    q = jnp.einsum("btl,lhd->bthd", normal(x @ p["q down"]) * p["q gain"], p["q up"])
    c, shared = jnp.split(x @ p["kv down"], [RANK], -1)
    kv = jnp.einsum("btl,lhd->bthd", normal(c), p["kv up"])
    return jnp.einsum("bqhd,hde->bqe", _latent(q, kv, shared), p["out"])


def latent_of_flat_matrices(p, x):
    c, shared = jnp.split(x @ p["kv down"], [RANK], -1)
    q, kv = split(x @ p["q down"] @ p["q up"], HEADS), split(c @ p["kv up"], HEADS)
    return _latent(q, kv, shared).reshape(BATCH, TIME, -1) @ p["out"]


def _latent(q, kv, shared):
    (q, q_rotary), (k, v) = jnp.split(q, [SIZE], -1), jnp.split(kv, [SIZE], -1)
    shared = jnp.broadcast_to(rotated(shared[:, :, None]), (BATCH, TIME, HEADS, ROTARY))
    q = jnp.concatenate([q, rotated(q_rotary)], -1)
    return attended(q, jnp.concatenate([k, shared], -1), v)


LATENT = {
    "q down": shape(WIDTH, RANK),
    "q gain": shape(RANK),
    "q up": shape(RANK, HEADS, SIZE + ROTARY),
    "kv down": shape(WIDTH, RANK + ROTARY),
    "kv up": shape(RANK, HEADS, SIZE + VALUE),
    "out": shape(HEADS, VALUE, WIDTH),
}
LATENT_APART = {"q down": "io", "q gain": "o", "q up": "ibo"}
LATENT_APART |= {"kv down": "io[3,4]", "kv up": "ibo", "out": "bio"}


def in_blocks(p, x):
    """Keys in blocks, with sums that are carried, where what came of heads is lost sight of."""
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, p[n]) for n in "qkv")

    def block(carry, kv):
        weights = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, kv[0]))
        values = jnp.einsum("bhqk,bkhd->bqhd", weights, kv[1])
        return (carry[0] + values, carry[1] + weights.sum(-1)), None

    start = jnp.zeros_like(q), jnp.zeros((BATCH, HEADS, TIME))
    blocks = [jnp.stack(jnp.split(y, TIME, 1)) for y in (k, v)]
    (sums, total), _ = jax.lax.scan(block, start, blocks)
    x = sums / total.swapaxes(1, 2)[..., None]
    return jnp.einsum("bqhd,hde->bqe", x, p["out"])


def mapped_heads(p, x):
    def head(p, x):
        q, k, v = (x @ p[n] for n in "qkv")
        return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v

    return jax.vmap(head, (0, None), 2)(p["heads"], x).reshape(BATCH, TIME, -1) @ p["out"]


def layered(layer):
    return lambda p, x: jax.lax.scan(lambda x, p: (jax.checkpoint(layer)(p, x), None), x, p)[0]


def adapted(p, x):
    """Low rank beside a kernel."""
    q = jnp.einsum("bte,ehd->bthd", x, p["q"] + jnp.einsum("er,rhd->ehd", p["a"], p["b"]))
    return attended(q, q, split(x, HEADS))


ATTENTIONS = {
    "plain": (plain, PLAIN, PLAIN_APART),
    "flat": (
        of_flat_matrices,
        FLAT | {f"{n} bias": shape(HEADS * SIZE) for n in "qkv"},
        FLAT_APART | {f"{n} bias": "o[4]" for n in "qkv"},
    ),
    "batches of heads": (in_batches_of_heads, FLAT, FLAT_APART),
    "fused": (
        fused,
        {
            "qkv": shape(WIDTH, 3 * HEADS * SIZE),
            "bias": shape(3 * HEADS * SIZE),
            "out": FLAT["out"],
        },
        {"qkv": "io[12]", "bias": "o[12]", "out": "i[4]o"},
    ),
    "fused on an axis": (
        fused_on_an_axis,
        {"qkv": shape(WIDTH, 3, HEADS, SIZE), "out": PLAIN["out"]},
        {"qkv": "ibbo", "out": "bio"},
    ),
    "beside a perceptron": (
        beside_a_perceptron,
        {"in": shape(WIDTH, 3 * HEADS * SIZE + 7), "out": FLAT["out"], "down": shape(7, WIDTH)},
        {"in": f"io[{'6,' * 12}7]", "out": "i[4]o", "down": "io"},
    ),
    "grouped": (grouped, GROUPED, GROUPED_APART),
    "grouped, flat": (
        grouped_of_flat_matrices,
        FLAT | {n: shape(WIDTH, KEYS * SIZE) for n in "kv"},
        {"q": "io[4]", "k": "io[2]", "v": "io[2]", "out": "i[4]o"},
    ),
    "repeated keys": (
        with_repeated_keys,
        FLAT | {n: shape(WIDTH, KEYS * SIZE) for n in "kv"},
        {"q": "io[4]", "k": "io[2]", "v": "io[2]", "out": "i[4]o"},
    ),
    "grouped and fused": (
        grouped_and_fused,
        {"qkv": shape(WIDTH, (HEADS + 2 * KEYS) * SIZE), "out": FLAT["out"]},
        {"qkv": "io[8]", "out": "i[4]o"},
    ),
    "interleaved": (
        interleaved,
        {"qkv": shape(WIDTH, (HEADS + 2 * KEYS) * SIZE), "out": FLAT["out"]},
        {"qkv": "io[2]", "out": "i[4]o"},
    ),
    "of one key": (
        of_one_key,
        {"q": PLAIN["q"], "k": shape(WIDTH, SIZE), "v": shape(WIDTH, SIZE), "out": FLAT["out"]},
        {"q": "ibo", "k": "io", "v": "io", "out": "i[4]o"},
    ),
    "latent": (latent, LATENT, LATENT_APART),
    "latent, flat": (
        latent_of_flat_matrices,
        {
            **{name: LATENT[name] for name in ("q down", "kv down")},
            "q up": shape(RANK, HEADS * (SIZE + ROTARY)),
            "kv up": shape(RANK, HEADS * (SIZE + VALUE)),
            "out": shape(HEADS * VALUE, WIDTH),
        },
        {"q down": "io", "kv down": "io[3,4]", "q up": "io[4]", "kv up": "io[4]", "out": "i[4]o"},
    ),
    "in blocks": (
        in_blocks,
        {name: PLAIN[name] for name in ("q", "k", "v", "out")},
        {"q": "ibo", "k": "ibo", "v": "ibo", "out": "iio"},
    ),
    "mapped heads": (
        mapped_heads,
        {"heads": {n: shape(HEADS, WIDTH, SIZE) for n in "qkv"}, "out": FLAT["out"]},
        {**under("heads", dict.fromkeys("qkv", "bio")), "out": "i[4]o"},
    ),
    "scanned": (
        layered(plain),
        jax.tree.map(lambda x: shape(3, *x.shape), PLAIN),
        stack(PLAIN_APART),
    ),
    "adapted": (
        adapted,
        {"q": PLAIN["q"], "a": shape(WIDTH, RANK), "b": shape(RANK, HEADS, SIZE)},
        {"q": "ibo", "a": "io", "b": "ibo"},
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_come_apart(name):
    function, params, expected = ATTENTIONS[name]
    assert read(function, params, SEQUENCE, heads="apart") == expected
    # Unless one asks, nothing is read differently.
    together = read(function, params, SEQUENCE)
    assert together == read(function, params, SEQUENCE, heads="together") != expected
    for path, layout in together.items():
        assert expected[path].count("i") == layout.count("i") or path == "out"


def filtered(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


# Products of data with data that are no attention, and parameters without heads in attention.
OTHERS = {
    "bilinear": (
        lambda p, x: jnp.einsum(
            "bto,btor->btr",
            x @ p["gate"],
            jnp.einsum("bte,eor->btor", x, p["a"]) * jnp.einsum("bte,eor->btor", x, p["c"]),
        ),
        {"gate": shape(WIDTH, HEADS), "a": PLAIN["q"], "c": PLAIN["k"]},
    ),
    "matrices times data": (
        lambda p, x: jnp.einsum("btij,btj->bti", split(x @ p["field"], 3), x),
        {"field": shape(WIDTH, 3 * WIDTH)},
    ),
    "triangles": (
        lambda p, x: jnp.einsum("bic,bjc->bijc", x @ p["a"], x @ p["c"]) @ p["out"],
        {"a": shape(WIDTH, SIZE), "c": shape(WIDTH, SIZE), "out": shape(SIZE, WIDTH)},
    ),
    "gates": (
        lambda p, x: jnp.einsum("btc,bc->btc", x @ p["a"], x.mean(1) @ p["c"]) @ p["out"],
        {"a": shape(WIDTH, SIZE), "c": shape(WIDTH, SIZE), "out": shape(SIZE, WIDTH)},
    ),
    "filters": (  # of constants, and of data
        lambda p, x: (
            filtered(filtered(x @ p["a"], jnp.ones((3, SIZE, SIZE))), split(x[0] @ p["c"], SIZE))
            @ p["out"]
        ),
        {
            "a": shape(WIDTH, SIZE),
            "c": shape(WIDTH, SIZE * SIZE),
            "out": shape(SIZE, WIDTH),
        },
    ),
    "one head": (
        lambda p, x: attended(*((x @ p[n])[:, :, None] for n in "qkv"))[:, :, 0] @ p["out"],
        {**{n: shape(WIDTH, SIZE) for n in "qkv"}, "out": shape(SIZE, WIDTH)},
    ),
    "heads inside": (  # each head is every fourth column
        lambda p, x: attended(
            *((x @ p[n]).reshape(BATCH, TIME, SIZE, HEADS).swapaxes(2, 3) for n in "qkv")
        ),
        {n: FLAT[n] for n in "qkv"},
    ),
    "contrast": (
        lambda p, x: jnp.einsum("btd,sd->bts", x @ p["a"], x[0] @ p["c"]),
        {"a": shape(WIDTH, SIZE), "c": shape(WIDTH, SIZE)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_does(name):
    function, params = OTHERS[name]

    def loss(params, x):
        return squares(function(params, x))

    assert read_roles(loss, params, SEQUENCE, heads="apart") == read_roles(loss, params, SEQUENCE)


APART = {
    **under("query", "key", "value", of("ibo", "bo")),
    **under("out", of("bio", "o")),
}


def linen(module, x=SEQUENCE):
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    return lambda **options: read(lambda p, x: squares(module.apply(p, x)), params, x, **options)


class Layers(nn.Module):
    """Attention that is scanned over, or mapped."""

    lift: str

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.lift == "vmap":
            options |= {"in_axes": None, "axis_size": 3}
            return nn.vmap(nn.MultiHeadDotProductAttention, **options)(2, name="attention")(x)
        attention = nn.MultiHeadDotProductAttention(2, name="attention")
        scan = nn.scan(lambda module, x, _: (x + module(x), None), length=3, **options)
        return scan(attention, x, None)[0]


def test_linen():
    attention = linen(nn.MultiHeadDotProductAttention(2))
    assert attention() == ATTENTION
    assert attention(heads="apart") == APART
    for lift in ("scan", "vmap"):
        expected = under("attention", stack(APART))
        assert linen(Layers(lift))(heads="apart") == expected


def test_nnx():
    def make(rngs):
        return nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)

    x, attention = jnp.ones(SEQUENCE.shape), make(nnx.Rngs(0))
    assert read(lambda model, x: squares(model(x)), attention, x) == ATTENTION
    assert read(lambda model, x: squares(model(x)), attention, x, heads="apart") == APART
    several = nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(0))
    each = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    table = read(lambda model, x: squares(each(model, x)), several, x, heads="apart")
    assert table == stack(APART)


def test_each_head_is_orthogonalized():
    hidden = Spectral(orthogonalizer=ExactPolar())
    options = {"last": None, "hidden": hidden, "first": hidden, "heads": "apart"}
    norms = infer_norms(plain, PLAIN, SEQUENCE, **options)
    d = np.random.default_rng(0).standard_normal((WIDTH, HEADS, SIZE))
    found = norms.norms[norms.labels(PLAIN)["q"]].lmo(jnp.asarray(d, jnp.float32))
    for head in range(HEADS):
        u, _, v = np.linalg.svd(d[:, head], full_matrices=False)
        np.testing.assert_allclose(found[:, head], (SIZE / WIDTH) ** 0.5 * u @ v, atol=1e-4)
    numbers = norms.muon_dimension_numbers(PLAIN)
    assert numbers["q"] == ((0,), (2,))
    assert numbers["out"] == ((1,), (2,))


def test_no_other_word():
    with pytest.raises(ValueError, match="heads is 'together' or 'apart'; got 'alone'"):
        infer_norms(plain, PLAIN, SEQUENCE, last=None, heads="alone")
