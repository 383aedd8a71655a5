"""What reading follows, and where a wrong answer is near: a program and what its parameters are.

A row has a name, the inputs and parameters, and the program. A parameter is given by what is to be
read and its sizes, `w: io 5 7`; several readings may be right, `w: io/oi 5 7`. An input has a name
of `INPUTS`, or sizes alone; where there is none, it is `x: ROWS`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from scion_jax import BiasRMS, ColNorm, infer_norms
from tests.reading.support import (
    INPUTS,
    disagreements,
    normal,
    programs,
    roles_of,
    shape,
    spelled,
    squares,
)

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

relu, tanh, softmax, einsum = jax.nn.relu, jnp.tanh, jax.nn.softmax, jnp.einsum
CONSTANT = np.sin(np.arange(45.0, dtype=np.float32)).reshape(9, 5)
ORDER = np.array([3, 1, 0, 2, 4])
OFFSETS = np.arange(9)[:, None] - np.arange(9) + 8
TORCH = ("NCHW", "OIHW", "NCHW")


def wave(kernel, image, spec=("NHWC", "HWIO", "NHWC"), groups=1):
    ones = (1,) * (image.ndim - 2)
    options = {"dimension_numbers": spec, "feature_group_count": groups}
    return lax.conv_general_dilated(image, kernel, ones, "SAME", **options)


def attend(q, k, v):
    return softmax(q @ k.swapaxes(-1, -2)) @ v


def gated(x):
    gate, up = jnp.split(x, 2, -1)
    return jax.nn.silu(gate) * up


def heads_apart(x, w):
    return einsum("...i,ihd->...hd", x, w)


@jax.custom_jvp
def swish(x):
    return x * jax.nn.sigmoid(x)


@jax.custom_vjp
def linear(x, w):
    return x @ w


swish.defjvp(lambda primals, tangents: (swish(*primals), tangents[0]))
linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


def on_one_device(x, w):
    spec = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {"in_specs": (spec("d"), spec()), "out_specs": spec("d")}
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, **places)(x, w)


def scanned(layer):
    return lambda x, **stack: lax.scan(lambda x, w: (layer(x, **w), None), x, stack)[0]


ATTENTION = ", ".join(f"{n}: ioo 32 4 8, {n}_bias: oo 4 8" for n in "qkv") + ", out: iio 4 8 32"
SCANNED_ATTENTION = re.sub(r": (\w+)", r": b\1 3", ATTENTION)


def attention_of_heads(x, out, **w):
    q, k, v = (heads_apart(x, w[n]) + w[f"{n}_bias"] for n in "qkv")
    return x + einsum("btnh,nhd->btd", jax.nn.dot_product_attention(q, k, v), out)


def routed(x, router):
    scores = softmax(x @ router)
    return jnp.max(scores, -1, keepdims=True), jnp.argmax(scores, -1)


def experts(x, wi, wo, router):
    everyone = relu(einsum("btd,edh->bteh", x, wi))
    return x + einsum("bteh,ehd,bte->btd", everyone, wo, softmax(x @ router))


FOLLOWED = programs(
    """
# Gains.
a dot without a contracted axis | g: o 5 | einsum("ni,i->ni", x, g)
a dot of two axes without a contracted one | x: 6 2 4, g: oo 2 4 | einsum("nhd,hd->nhd", x, g)
a dot with batch axes alone | g: o 5 | lax.dot_general(g, x.T, (((), ()), ((0,), (0,))))
a dot without free axes | w: o 5 | x @ w
a gain in front of a kernel | w: io 5 7, g: o 5 | x @ (g[:, None] * w)
a gain behind a kernel | w: io 5 7, g: o 7 | x @ (w * g)
a gain between two factors | u: io 5 3, s: o 3, v: io 3 7 | x @ (u * s @ v)
a number | w: io 5 5, g: o | x + g * tanh(x @ w)
# Embeddings.
a tied embedding | t: TOKENS, e: tied oi 11 8, g: o 8 | (normal(e[t]) * g) @ e.T
a tied embedding that is cut by constants first | t: TOKENS, e: tied oi 12 8 |
    tanh(e[:11][t]) @ e[:11].T
a tied embedding of unit rows | t: TOKENS, e: tied oi 11 8 |
    tanh((e / jnp.linalg.norm(e, axis=1, keepdims=True))[t]) @ e.T
a product with a one-hot | t: TOKENS, e: embedding io 11 8 | jax.nn.one_hot(t, 11) @ e
a sum of code books | t: TOKENS, e: embedding bio 2 11 8 | jax.vmap(lambda e, t: e[t])(e, t).sum(0)
numbers that are looked up | t: TOKENS, e: o 11 | e[t]
# Weights that are changed before they are used.
weight norm | w: io 5 7, g: o 7 | x @ (w * (g / jnp.linalg.norm(w, axis=0)))
weights without their mean | w: io 5 7 | x @ ((w - w.mean(0)) / (w.std(0) + 1e-4))
antisymmetric weights | w: io 5 5 | x @ (w - w.T)
a triangle | w: io 5 5 | x @ jnp.tril(w)
a kernel of squares | w: io 5 7 | x @ jax.nn.softplus(w)
low rank | a: io 5 2, b: io 2 7 | x @ (a @ b)
low rank, added | w: io 5 7, a: io 5 2, b: io 2 7 | x @ (w + 2.0 * (a @ b))
reduced over no axes | w: io 5 7 | x @ lax.reduce(w, 0.0, lax.add, ())
a constant index through jit | w: bio 3 5 7 | x @ jax.jit(lambda w, n: w[n - 1])(w, 2)
constant indices, one by one | w: bio 3 5 7 | sum(tanh(x @ w[n]) for n in range(3))
# Heads, and what comes in several.
one axis to three | x: 2 5 16, kernel: iooo 16 3 4 8, bias: ooo 3 4 8 |
    relu(einsum("ntd,dabc->ntabc", x, kernel) + bias)
two axes to three | x: 2 5 4 8, w: iiooo 4 8 2 3 5 | einsum("ntij,ijabc->ntabc", x, w)
Gemma's queries | x: WIDE, w: oio 4 32 8 | einsum("btd,ndh->btnh", x, w)
queries, keys and values apart | x: WIDE, w: boio 3 4 32 8, b: boo 3 4 8 |
    attend(*einsum("btd,sndh->sbnth", x, w) + b[:, None, :, None])
gates whose result is joined with something else | w: io[2] 5 16 |
    jnp.concatenate([gated(x @ w), x], -1)
# Convolutions.
grouped | x: IMAGES, w: ssio[2] 3 3 2 6 | wave(w, x, groups=2)
grouped, as in PyTorch | x: IMAGES, w: o[2]iss 6 2 3 3 | wave(w, x.transpose(0, 3, 1, 2), TORCH, 2)
depthwise, as in Flax | x: IMAGES, w: ssio[4] 3 3 1 4 | wave(w, x, groups=4)
depthwise, as in Equinox | x: IMAGES, w: o[4]iss 4 1 3 3 |
    wave(w, x.transpose(0, 3, 1, 2), TORCH, 4)
depthwise, as in Keras | x: IMAGES, w: ssbo 3 3 4 1 | wave(w.reshape(3, 3, 1, 4), x, groups=4)
grouped, and split afterwards | x: IMAGES, w: ssio[2] 3 3 2 6 |
    jnp.multiply(*jnp.split(wave(w, x, groups=2), 2, -1))
depthwise, and split afterwards | x: IMAGES, w: ssio[4] 3 3 1 4 |
    jnp.multiply(*jnp.split(wave(w, x, groups=4), 2, -1))
grouped, written in two | x: IMAGES, w: ssio[2] 3 3 2 6 |
    jnp.concatenate([wave(w[..., :3], x[..., :2]), wave(w[..., 3:], x[..., 2:])], -1)
transposed | x: IMAGES, w: ssio 3 3 4 5 | lax.conv_transpose(x, w, (2, 2), "SAME")
# Control flow and transformations.
scanned experts | x: 2 5 16, wi: bbio 3 8 16 32, wo: bbio 3 8 32 16, router: bio 3 16 8 |
    scanned(experts)(x, wi=wi, wo=wo, router=router)
scanned convolution | x: 2 8 8 8, w: bssio 3 3 3 8 8 |
    scanned(lambda x, w: relu(wave(w, x)))(x, w=w)
scanned convolution of rows | x: WIDE, w: bsio 3 3 32 32 |
    scanned(lambda x, w: relu(wave(w, x, ("NWC", "WIO", "NWC"))))(x, w=w)
scanned norms | x: WIDE, scale: bo 3 32, bias: bo 3 32 |
    scanned(lambda x, scale, bias: normal(x) * scale + bias)(x, scale=scale, bias=bias)
scanned numbers | scale: o[3] 3 | scanned(lambda x, scale: x * scale)(x, scale=scale)
mapped experts of one input that are summed | w: bio 3 5 7 |
    jax.vmap(lambda kernel: x @ kernel)(w).sum(0)
scan | w: bio 3 5 5, b: bo 3 5 | lax.scan(lambda x, p: (tanh(x @ p[0] + p[1]), None), x, (w, b))[0]
fori_loop | w: bio 3 5 5, b: bo 3 5 | lax.fori_loop(0, 3, lambda n, x: tanh(x @ w[n] + b[n]), x)
while_loop | w: io 5 5 |
    lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, tanh(s[1] @ w)), (0, x))[1]
cond | w: io 5 7 | lax.cond(jnp.sum(x) > 0, lambda w: x @ w, lambda w: 0 * x @ w, w)
switch | w: bio 3 5 7 | lax.switch(jnp.argmax(x[0]), [lambda x, n=n: x @ w[n] for n in range(3)], x)
checkpoint | w: io 5 7, b: o 7 | jax.checkpoint(lambda w, b: relu(x @ w + b))(w, b)
custom_jvp | w: io 5 7 | swish(x @ w)
custom_vjp | w: io 5 7 | linear(x, w)
custom_vjp, differentiated | w: io 5 7 | jax.value_and_grad(lambda w: squares(linear(x, w)))(w)[0]
shard_map | w: io 5 7 | on_one_device(x, w)
a mapped ensemble | w: bio 3 5 7, b: bo 3 7, v: bio 3 7 4 |
    jax.vmap(lambda w, b, v: relu(x @ w + b) @ v)(w, b, v)
no entries | x: 0 5, w: io 5 0, b: o 0 | x @ w + b
one input | x: 6 1, w: bo 1 7 | x * w
one output | w: io 5 1, b: o 1 | x @ w + b
forces | w: io 5 7, v: io 7 3 | jax.grad(lambda x: jnp.sum(tanh(tanh(x @ w) @ v)))(x)
a gradient penalty | w: io 5 7, v: io 7 3 |
    jax.value_and_grad(lambda x: jnp.sum(tanh(x @ w) @ v))(x)
a gradient that is only logged | w: io 5 7 |
    lax.stop_gradient(jax.grad(lambda w: squares(x @ w))(w)).sum() + x @ w
""",
    globals(),
)
FOLLOWED |= {
    "attention": (f"x: WIDE, {ATTENTION}", attention_of_heads),
    "scanned attention": (f"x: WIDE, {SCANNED_ATTENTION}", scanned(attention_of_heads)),
}


def followed(text):
    """Adds a program of several lines."""

    def add(function):
        FOLLOWED[function.__name__] = text, function
        return function

    return add


@followed("x: SEQUENCE, token: boo 1 1 8, place: bo/oo 10 8, w: io 8 3")
def a_class_token(x, token, place, w):
    return (jnp.concatenate([jnp.broadcast_to(token, (2, 1, 8)), x], 1) + place)[:, 0] @ w


@followed("x: SEQUENCE, wx: io 8 4, wh: io 4 4, h: o 4")
def a_first_state(x, wx, wh, h):
    def step(h, x):
        return tanh(x @ wx + h @ wh), None

    return lax.scan(step, jnp.broadcast_to(h, (2, 4)), x.swapaxes(0, 1))[0]


@followed("x: SEQUENCE, latents: bo/oo 3 8, wq: io 8 4, wk: io 8 4, gain: o 8, bias: o 8")
def queries_that_are_normed(x, latents, wq, wk, gain, bias):
    return attend((normal(latents) * gain + bias) @ wq, x @ wk, x)


@followed("x: SEQUENCE, table: bo/oo 9 8, gain: o 8, bias: o 8, wq: io 8 4, wk: io 8 4")
def positions_attend_to_positions(x, table, gain, bias, wq, wk):
    places = normal(table) * gain + bias
    return softmax((x @ wq) @ (x @ wk).swapaxes(1, 2) + (places @ wq) @ (places @ wk).T)


@followed("enc: io 5 4, code: embedding io 7 4, dec: io 4 5")
def the_nearest_code_does_not_count(x, enc, code, dec):
    z = x @ enc
    distance = jnp.sum(code**2, 1) - 2 * z @ code.T
    found = code[jnp.argmin(distance, 1)]
    return tanh(z + lax.stop_gradient(found - z)) @ dec, lax.stop_gradient(z) - found


@followed("w: io 5 7")
def spectral_norm(x, w):
    u = jnp.ones(7)
    for _ in range(2):
        v = lax.stop_gradient(w @ u / jnp.linalg.norm(w @ u))
        u = lax.stop_gradient(w.T @ v / jnp.linalg.norm(w.T @ v))
    return x @ (w / (v @ w @ u))


@followed("x: SEQUENCE, rate: oo 8 3, start: oo 8 3, end: oo 8 3")
def a_moving_average(x, rate, start, end):
    powers = jnp.exp(jax.nn.log_sigmoid(rate)[..., None] * jnp.arange(9.0))
    kernel = jnp.sum((start * end)[..., None] * powers, 1)
    return jnp.fft.irfft(jnp.fft.rfft(x, 18, axis=1) * jnp.fft.rfft(kernel, 18).T, 18, axis=1)


@followed("x: SEQUENCE, a: oo 8 3, b: oo 8 3, c: oo 8 3, d: oo 8 3, dt: o 8")
def a_state_space_as_a_kernel(x, a, b, c, d, dt):
    poles = lax.complex(-jnp.exp(a), b) * jnp.exp(dt)[:, None].astype(jnp.complex64)
    powers = jnp.exp(poles[..., None] * jnp.arange(9).astype(poles.dtype))
    kernel = einsum("hn,hnt->ht", lax.complex(c, d), powers)
    return jnp.fft.irfft(jnp.fft.rfft(x, 18, axis=1) * jnp.fft.rfft(kernel.real, 18).T, 18, axis=1)


@followed("x: IMAGES, z: 6, style: io 6 4, w: ssio 3 3 4 5")
def a_kernel_that_data_scales(x, z, style, w):
    scaled = w * (z @ style)[:, None]
    return wave(scaled * lax.rsqrt(jnp.sum(scaled**2, (0, 1, 2)) + 1e-6), x)


@followed("x: SEQUENCE, w: bioo 3 8 2 4")
def queries_keys_and_values_lead(x, w):
    return attend(*einsum("btd,sdnh->sbnth", x, w))


@followed("x: SEQUENCE, w: iboo 8 3 2 4, b: boo 3 2 4")
def queries_keys_and_values_are_moved_ahead(x, w, b):
    return attend(*(einsum("btd,dsnh->sbnth", x, w) + b[:, None, :, None]))


@followed("x: SEQUENCE, w: io[2] 8 8, b: o[2] 8, out: io 4 3")
def slices_of_one_kernel(x, w, b, out):
    gate, up = x @ w[:, :4] + b[:4], x @ w[:, 4:] + b[4:]
    return (jax.nn.silu(gate) * up) @ out


@followed("x: SEQUENCE, w: io[8,4,4] 8 16, wk: io 4 3, wv: io 4 8")
def splits_of_splits(x, w, wk, wv):
    q, kv = jnp.split(x @ w, 2, -1)
    k, v = jnp.split(kv, 2, -1)
    return tanh(q) * (v @ wv), relu(k) @ wk


@followed("x: SEQUENCE, w: io 8 6, out: io 6 3")
def halves_that_are_put_together_again(x, w, out):
    a, b = jnp.split(x @ w, 2, -1)
    c, s = jnp.cos(jnp.arange(3.0)), jnp.sin(jnp.arange(3.0))
    return tanh(jnp.concatenate([a * c - b * s, b * c + a * s], -1)) @ out


@followed("x: ROWS, h: 6 4, w: io[4] 9 16, b: o[4] 16")
def an_lstm_of_one_kernel(x, h, w, b):
    i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ w + b, 4, -1)
    return jax.nn.sigmoid(o) * tanh(jax.nn.sigmoid(f) + jax.nn.sigmoid(i) * tanh(g))


@followed("x: ROWS, h: 6 4, wx: io[4] 5 16, wh: io[4] 4 16, b: o[4] 16")
def an_lstm_of_two_kernels(x, h, wx, wh, b):
    i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ jnp.concatenate([wx, wh]) + b, 4, -1)
    return jax.nn.sigmoid(o) * tanh(jax.nn.sigmoid(f) + jax.nn.sigmoid(i) * tanh(g))


@followed("router: io 5 3, w: bio 3 5 7, b: bo 3 7")
def experts_by_ragged_dot(x, router, w, b):
    gate, chosen = routed(x, router)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=3)
    return gate * (lax.ragged_dot(x[order], w, sizes) + b[chosen[order]])[jnp.argsort(order)]


@followed("router: io 5 3, w: bio 3 5 7, b: bo 3 7")
def experts_by_batch_axes(x, router, w, b):
    everyone = tanh(einsum("ni,eio->neo", x, w) + b)
    return einsum("neo,ne->no", everyone, softmax(x @ router))


@followed("router: io 5 3, w: bio 3 5 7, b: bo 3 7")
def experts_by_gather(x, router, w, b):
    gate, chosen = routed(x, router)
    return gate * (einsum("ni,nio->no", x, w[chosen]) + b[chosen])


@followed("router: io 5 3, w: bio 3 5 7, b: bo 3 7")
def experts_by_onehot(x, router, w, b):
    gate, chosen = routed(x, router)
    pick = jax.nn.one_hot(chosen, 3)
    return gate * (einsum("eni,eio->no", einsum("ne,ni->eni", pick, x), w) + pick @ b)


@followed("x: ROWS, y: 6 3, w: io 5 7, b: o 7, v: io 7 3")
def a_step_of_maml(x, y, **params):
    def loss(p):
        return squares(relu(x @ p["w"] + p["b"]) @ p["v"] - y)

    steps = jax.grad(loss)(params)
    return loss(jax.tree.map(lambda p, step: p - 0.1 * step, params, steps))


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name):
    assert disagreements(*FOLLOWED[name]) == {}


def test_complex_leaves_are_read_but_have_no_norm():
    _, arrays, _ = spelled("w: io 5 7, b: o 7", jnp.complex64)
    x = shape(6, 5, dtype=jnp.complex64)
    roles = roles_of(lambda p, x: jnp.sum(jnp.abs(x @ p["w"] + p["b"])), arrays, x)
    assert (roles["w"].kind, roles["w"].layout) == ("matrix", "io")
    assert (roles["b"].kind, roles["b"].layout) == ("vector", "o")
    assert all("complex" in role.problem for role in roles.values())


# Traps: read rightly, or not at all. Where it is "-", only "unknown" is right.


def mixed(x, w, g):
    """A matrix for every row."""
    return einsum("ni,nio->no", x, einsum("ne,eio->nio", softmax(x @ g), w))


def autoencoder(x, w, b):
    return relu(x @ w + b) @ w.T - x


def unraveled(x, flat):
    params = ravel_pytree({"w": jnp.ones((5, 7)), "b": jnp.ones(7)})[1](flat)
    return relu(x @ params["w"] + params["b"])


def fast_weights(x, start, key, value, query):
    def step(w, x):
        k, v, q = x @ key, x @ value, x @ query
        w = w - 0.1 * jnp.outer(k, k @ w - v)
        return w, q @ w

    return lax.scan(step, start, x)[1]


def relative(x, q, r):
    return softmax(einsum("thd,shd->hts", heads_apart(x, q), heads_apart(CONSTANT, r)))


def glow(x, low, up, s):
    low, up = jnp.tril(low, -1) + jnp.eye(5), jnp.triu(up, 1) + jnp.diag(jnp.exp(s))
    return x @ (jnp.eye(5)[ORDER] @ low @ up)


def cut_channels(t, e, w, v):
    x = e[t]
    a, b = jnp.split(x + tanh(x @ w), 2, -1)
    return jnp.concatenate([a * jnp.cos(a), b], -1) @ v


multiply = jax.jit(jnp.matmul)  # traced once for both, if axes had no roles


def both_ways(x, w):
    return multiply(tanh(multiply(x, w)), w.T) - x


TRAPS = programs(
    """
queries | x: SEQUENCE, q: bo/oo 7 5, wq: io 5 6, wk: io 8 6 |
    softmax(einsum("qk,bsk->bqs", q @ wq, x @ wk))
queries, by attention | x: SEQUENCE, q: bo/oo 7 5, wq: io 5 6, wk: io 8 6 |
    attend(q @ wq, x @ wk, x)
one query | x: SEQUENCE, q: o 5, wq: io 5 6, wk: io 8 6 | softmax((x @ wk) @ (q @ wq))
queries, mapped | x: SEQUENCE, q: bo/oo 7 5, wq: oi 6 5, wk: oi 6 8 |
    softmax(jax.vmap(lambda q: wq @ q)(q) @ (x @ wk.T).swapaxes(1, 2))
queries, transposed | x: SEQUENCE, q: bo/oo 7 5, wq: oi 6 5, wk: oi 6 8 |
    softmax((wq @ q.T).T @ (x @ wk.T).swapaxes(1, 2))
queries of heads | x: SEQUENCE, q: bo/oo 7 5, wq: ioo 5 2 3, wk: ioo 8 2 3 |
    einsum("qhk,bshk->bhqs", heads_apart(q, wq), heads_apart(x, wk))
queries with a bias | x: SEQUENCE, q: bo/oo 7 5, wq: io 5 6, wk: io 8 6, b: o 6 |
    softmax((q @ wq + b) @ (x @ wk).swapaxes(1, 2))
queries that are bent | x: SEQUENCE, q: bo/oo 7 5, wq: io 5 6, wk: io 8 6 |
    softmax(relu(q @ wq) @ (x @ wk).swapaxes(1, 2))
queries that are normed by a gain | x: SEQUENCE, q: bo/oo 7 5, wq: io 5 6, wk: io 8 6, g: o 5 |
    softmax((normal(q) * g) @ wq @ (x @ wk).swapaxes(1, 2))
queries for keys without a kernel | x: SEQUENCE, q: bo/oo 7 5, w: io 5 8 |
    softmax((q @ w) @ x.swapaxes(1, 2))
a query for each image | x: SEQUENCE, q: boo/bbo/ooo 1 1 5, wq: io 5 6, wk: io 8 6 |
    attend(jnp.broadcast_to(q, (2, 1, 5)) @ wq, x @ wk, x)
a mixture | w: bio 3 5 7, g: io 5 3 | mixed(x, w, g)
a mixture at once | w: bio 3 5 7, g: io 5 3 | einsum("ni,ne,eio->no", x, softmax(x @ g), w)
a mixture of an outer product | w: bio 3 5 7, g: io 5 3 |
    einsum("nie,eio->no", x[..., None] * softmax(x @ g)[:, None], w)
a mixture, summed | w: bio 3 5 7, g: io 5 3 |
    einsum("ni,nio->no", x, (softmax(x @ g)[..., None, None] * w).sum(1))
a mixture for all rows | w: bio 3 5 7, g: io 5 3 | x @ jnp.tensordot(softmax(x.mean(0) @ g), w, 1)
a mixture, mapped | w: bio 3 5 7, g: io 5 3 |
    jax.vmap(lambda x: x @ jnp.tensordot(softmax(x @ g), w, 1))(x)
a mixture with biases | w: bio 3 5 7, g: io 5 3, b: bo/io 3 7 | mixed(x, w, g) + softmax(x @ g) @ b
a mixture of convolutions | x: IMAGES, w: bssio 3 3 3 4 5, g: io 4 3 |
    wave(jnp.tensordot(softmax(x.mean((0, 1, 2)) @ g), w, 1), x)
W + Δ(x) | w: io 5 7, d: io 5 35 | einsum("ni,nio->no", x, w + (x @ d).reshape(6, 5, 7))
W + Δ of all | w: io 5 7, d: io 5 35 | x @ (w + (x.mean(0) @ d).reshape(5, 7))
W + u(x) v(x)ᵀ | w: io 5 7, u: io 5 5, v: io 5 7 |
    jax.vmap(lambda x: x @ (w + jnp.outer(x @ u, x @ v)))(x)
W + an input | x: ROWS, d: 5 7, w: io 5 7 | x @ (w + d)
Wᵀ + an input | x: ROWS, d: 5 7, w: oi 7 5 | x @ (w.T + 0.1 * d)
W + noise | x: ROWS, key: KEY, w: io 5 7 | x @ (w + jax.random.normal(key, (5, 7)))
a window + noise | x: IMAGES, key: KEY, w: ssio 3 3 4 5 |
    wave(w + jax.random.normal(key, w.shape), x)
Bayes by backpropagation | x: ROWS, key: KEY, w: io 5 7, r: io 5 7 |
    x @ (w + jax.nn.softplus(r) * jax.random.normal(key, (5, 7)))
dropconnect | x: ROWS, key: KEY, w: io 5 7 |
    x @ jnp.where(jax.random.bernoulli(key, 0.5, (5, 7)), 2 * w, 0)
weights that learn as they go | x: 9 6, start: io 5 7, value: io 6 7, key: io 6 5, query: io 6 5 |
    fast_weights(x, start, key, value, query)
two layers along the input axis | w: i[5,7]o 12 7 | tanh(x @ w[:5]) @ w[5:]
two layers along the output axis | w: io[2] 5 10 | tanh(x @ w[:, :5]) @ w[:, 5:]
two layers, the second of them turned | w: - 5 10 | tanh(x @ w[:, :5]) @ w[:, 5:].T
two layers in a stack, the first of them turned | w: - 2 5 5 | tanh(x @ w[0].T) @ w[1]
a kernel with its bias as a row | w: io 6 7 | tanh(x @ w[:5] + w[5])
a kernel with its bias as a column | w: oi 7 6 | tanh(w[:, :5] @ x.T + w[:, 5:])
expm | w: - 5 5 | x @ jax.scipy.linalg.expm(w - w.T)
QR | w: - 5 5 | x @ jnp.linalg.qr(w)[0]
Cholesky | w: - 5 5 | x @ jnp.linalg.cholesky(w @ w.T + jnp.eye(5))
solve | w: - 5 5 | x @ jnp.linalg.solve(jnp.eye(5) + w, jnp.eye(5) - w)
solve for data | w: - 5 5 | jnp.linalg.solve(w, x.T)
solve a triangle | w: - 5 5 | jax.scipy.linalg.solve_triangular(w, x.T, lower=True)
inverse | w: - 5 5 | x @ jnp.linalg.inv(w)
determinant | w: - 5 5 | x * jnp.linalg.det(w)
power | w: - 5 5 | x @ jnp.linalg.matrix_power(w, 3)
square | w: - 5 5 | x @ (w @ w)
sort | w: - 5 5 | x @ jnp.sort(w, 1)
sum of all before | w: io 5 7 | x @ jnp.cumsum(w, 0)
callback | w: io 5 7 | x @ jax.pure_callback(lambda w: w, shape(5, 7), w)
both sides | w: - 5 5 | (tanh(x @ w), tanh(x @ w.T))
both sides, in one trace | w: - 5 5 | both_ways(x, w)
added and multiplied | w: - 5 5 | (tanh(x + w[0]), x @ w)
looked up, and a hidden kernel | t: TOKENS, w: tied io 7 7, v: io 7 3 | tanh(w[t] @ w) @ v
an autoencoder | w: - 5 7, b: o 7 | autoencoder(x, w, b)
a gain of two axes | w: oo 6 5 | x * w
cut channels of a residual stream | t: TOKENS, e: embedding io 11 8, w: io 8 8, v: io 8 3 |
    cut_channels(t, e, w, v)
interleaved halves | w: io 5 8, v: io 4 3 | ((x @ w)[:, ::2] * (x @ w)[:, 1::2]) @ v
shuffled channels | w: io 5 8, v: io 8 3 | (x @ w).reshape(6, 2, 4).swapaxes(1, 2).reshape(6, 8) @ v
permuted rows | w: io 5 7 | x[:, ORDER] @ w[ORDER]
taken rows | w: io 5 7 | x @ jnp.take(w, ORDER, axis=0)
permuted columns | w: io 5 5 | x @ w[:, ORDER]
chosen rows | w: io 5 7 | x[:, :2] @ w[ORDER[:2]]
column by column | w: io 5 7 | tanh(jnp.stack([x @ w[:, n] for n in range(7)], 1))
LoRA | w: io 5 7, a: io 5 2, b: io 2 7 | x @ (w + a @ b)
LoRA in PyTorch's order | w: oi 7 5, a: oi 2 5, b: oi 7 2 | x @ (w + b @ a).T
LoRA alone, in PyTorch's order | a: oi 2 5, b: oi 7 2 | x @ (b @ a).T
LoRA of an embedding | t: TOKENS, e: embedding io 11 8, a: embedding io 11 2, b: io 2 8 |
    (e + a @ b)[t]
three factors | a: io 5 3, b: io 3 4, c: io 4 7 | x @ (a @ b @ c)
a diagonal between factors | a: io 5 3, s: o 3, b: io 3 7 | x @ (a @ jnp.diag(s) @ b)
Kronecker | x: 6 6, a: oi 3 2, b: oi 4 3 | jnp.kron(a, b) @ x.T
Glow's triangles | low: io 5 5, up: io 5 5, s: o 5 | glow(x, low, up, s)
positions of Transformer-XL | q: ioo 5 2 3, r: ioo 5 2 3 | relative(x, q, r)
positions of Transformer-XL, one head | q: io 5 7, r: io 5 7 | softmax((x @ q) @ (CONSTANT @ r).T)
a network of positions | x: SEQUENCE, v: io 5 7, w: io 7 8 | x * (jnp.sin(CONSTANT @ v) @ w)
an average by constants | w: bio 3 5 7 | x @ jnp.tensordot(CONSTANT[0, :3], w, 1)
positions, cut | x: SEQUENCE, p: bo 12 8 | x + p[:9]
positions, all of them | x: SEQUENCE, p: bo/oo 9 8 | x + p
positions, counted | x: SEQUENCE, p: bo/embedding io 12 8 | x + p[jnp.arange(9)]
positions, as data | x: SEQUENCE, t: TOKENS, p: embedding io 12 8 | x + p[t]
relative positions | x: 2 9 9, p: bo/embedding io 17 3 |
    softmax(x[:, None] + p[OFFSETS].transpose(2, 0, 1))
positions of Shaw | x: SEQUENCE, p: bo/embedding io/oi 17 8 |
    softmax(einsum("btd,tsd->bts", x, p[OFFSETS]))
scores of pairs | y: LABELS, p: bo/oo 3 3 | p[y[:-1], y[1:]]
bilinear | x: ROWS, y: 6 7, w: io/oi 5 7 | einsum("ni,ij,nj->n", x, w, y)
""",
    globals(),
)


@pytest.mark.parametrize("name", TRAPS)
def test_right_or_unknown(name):
    assert disagreements(*TRAPS[name], "unknown") == {}


REFUSED = {
    "a tied autoencoder": ("w: - 5 7, b: - 7", autoencoder, "uses disagree.*io.*oi"),
    "one trace for a kernel and its transpose": ("w: - 5 5", both_ways, "disagree"),
    "several parameters in one vector": ("flat: - 42", unraveled, "several parameters"),
    "only its mean": ("w: - 5 7", lambda x, w: x * w.mean(), "only a statistic"),
    "only a penalty": ("w: - 5 7", lambda x, w: (x, w), "only a statistic"),
    "a constant times a kernel": (
        "w: - 5 5", lambda x, w: x + CONSTANT[:6] @ w, "a constant, and inputs must be arg"),
    "a decomposition": ("w: - 5 5", lambda x, w: x @ jnp.linalg.qr(w)[0], "qr is no oper"),
    "queries times a kernel": (
        "w: - 4 5, q: - 7 4", lambda x, q, w: softmax((q @ w) @ x.T), "meets another parameter"),
    "rows one by one": (
        "w: - 5 7", lambda x, w: jnp.stack([x @ w[:, n] for n in range(7)]), "one by one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_words(name):
    text, function, words = REFUSED[name]
    inputs, params, (path, *_) = spelled(text)

    def loss(params, inputs):
        return squares(function(**inputs, **params))

    role = roles_of(loss, params, inputs)[path]
    assert role.kind == "unknown"
    with pytest.raises(ValueError, match=rf"(?s)'{path}' of shape.*{words}.*rules="):
        infer_norms(loss, params, inputs, last=None)


@pytest.mark.parametrize("cast", [lambda w: w.astype(jnp.int8).astype(jnp.float32), jnp.sign])
def test_integers_of_a_parameter_are_no_use_of_it(cast):
    roles = roles_of(lambda p, x: squares(x @ cast(p["w"])), {"w": shape(5, 7)}, INPUTS["ROWS"])
    assert roles["w"].kind == "unused"


def test_tables_of_positions_have_one_norm_however_they_are_read():
    rows, columns = BiasRMS(layout="bo"), ColNorm(layout="io")
    table = jnp.asarray(np.random.default_rng(0).normal(size=(12, 8)), jnp.float32)
    np.testing.assert_allclose(rows.lmo(table), columns.lmo(table), rtol=1e-6)
    np.testing.assert_allclose(rows.gauge(table), columns.gauge(table), rtol=1e-6)
    np.testing.assert_allclose(rows.dual_norm(table), columns.dual_norm(table), rtol=1e-6)
