"""What reading follows: small programs, written plainly, and what each of their parameters is.

A program takes its inputs by position and its parameters by name. Parameters are given by what they
are to be read as, and their sizes: `"matrix io 5 7"`. Several readings may be right: `"a | b"`.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from leaves import shape, squares
from scion_jax.norms.layout import parse_layout
from scion_jax.reading import read_roles

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]


def roles_of(function, params, *inputs):
    """Reads a program, and checks that all layouts are layouts."""
    roles = {role.path: role for role in read_roles(function, params, *inputs)}
    for role in roles.values():
        assert role.kind in ("matrix", "embedding", "tied", "vector", "unused", "unknown"), role
        assert bool(role.layout) == (role.kind not in ("unused", "unknown")), role
        assert role.problem or role.kind != "unknown", role
        if role.layout:
            parse_layout(role.layout, role.shape)
    return roles


def spelled(params, dtype=jnp.float32):
    """Parameters, and which readings are right for each of them."""
    parts = {name: re.fullmatch(r"(.*?)((?: \d+)*)", text) for name, text in params.items()}
    arrays = {n: shape(*map(int, p[2].split()), dtype=dtype) for n, p in parts.items()}
    return arrays, {name: re.split(r" *\| *", part[1]) for name, part in parts.items()}


def disagreements(function, inputs, params, *others):
    """Reads a program of spelled parameters; returns what is read as something else."""
    arrays, right = spelled(params)
    roles = roles_of(lambda p, *xs: squares(function(*xs, **p)), arrays, *inputs)
    found = {name: f"{role.kind} {role.layout}".strip() for name, role in roles.items()}
    return {n: text for n, text in found.items() if text not in [*right[n], *others]}


def wave(kernel, image, spec=("NHWC", "HWIO", "NHWC"), groups=1):
    ones = (1,) * (image.ndim - 2)
    options = {"dimension_numbers": spec, "feature_group_count": groups}
    return lax.conv_general_dilated(image, kernel, ones, "SAME", **options)


def normal(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def attend(q, k, v):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v


relu, tanh, softmax, einsum = jax.nn.relu, jnp.tanh, jax.nn.softmax, jnp.einsum
ROWS, SEQUENCE, IMAGES = shape(6, 5), shape(2, 9, 8), shape(2, 8, 8, 4)
TOKENS, LABELS = shape(2, 9, dtype=jnp.int32), shape(6, dtype=jnp.int32)
DENSE, GAIN = "matrix io 5 7", "vector o 7"
LATENTS = {"latents": "vector bo | vector oo 3 8", "wq": "matrix io 8 4", "wk": "matrix io 8 4"}
CASES = {}


def case(*inputs, **params):
    """Adds a program."""

    def add(function):
        CASES[function.__name__] = function, inputs, params
        return function

    return add


def cases(table):
    """Adds programs of one line each."""
    CASES.update({name: (function, inputs, p) for name, (function, inputs, p) in table.items()})


# Gains.

cases(
    {
        "a dot without a contracted axis": (
            lambda x, g: einsum("ni,i->ni", x, g), [ROWS], {"g": "vector o 5"}),
        "a dot of two axes without a contracted one": (
            lambda x, g: einsum("nhd,hd->nhd", x, g), [shape(6, 2, 4)], {"g": "vector oo 2 4"}),
        "a dot with batch axes alone": (
            lambda x, g: lax.dot_general(g, x.T, (((), ()), ((0,), (0,)))),
            [ROWS], {"g": "vector o 5"}),
        "a dot without free axes": (lambda x, w: x @ w, [ROWS], {"w": "vector o 5"}),
        "a gain in front of a kernel": (
            lambda x, w, g: x @ (g[:, None] * w), [ROWS], {"w": DENSE, "g": "vector o 5"}),
        "a gain behind a kernel": (lambda x, w, g: x @ (w * g), [ROWS], {"w": DENSE, "g": GAIN}),
        "a gain between two factors": (
            lambda x, u, s, v: x @ (u * s @ v),
            [ROWS], {"u": "matrix io 5 3", "s": "vector o 3", "v": "matrix io 3 7"}),
        "a number": (lambda x, w, g: x + g * tanh(x @ w),
            [ROWS], {"w": "matrix io 5 5", "g": "vector o"}),
    }
)  # fmt: skip


# Learned tokens, states and queries.


@case(
    SEQUENCE, token="vector boo 1 1 8", place="vector bo | vector oo 10 8",
    w="matrix io 8 3",
)  # fmt: skip
def a_class_token(x, token, place, w):
    return (jnp.concatenate([jnp.broadcast_to(token, (2, 1, 8)), x], 1) + place)[:, 0] @ w


@case(SEQUENCE, wx="matrix io 8 4", wh="matrix io 4 4", h="vector o 4")
def a_first_state(x, wx, wh, h):
    def step(h, x):
        return tanh(x @ wx + h @ wh), None

    return lax.scan(step, jnp.broadcast_to(h, (2, 4)), x.swapaxes(0, 1))[0]


@case(SEQUENCE, **LATENTS, gain="vector o 8", bias="vector o 8")
def queries_that_are_normed(x, latents, wq, wk, gain, bias):
    return attend((normal(latents) * gain + bias) @ wq, x @ wk, x)


@case(
    SEQUENCE, table="vector bo | vector oo 9 8", gain="vector o 8", bias="vector o 8",
    wq="matrix io 8 4", wk="matrix io 8 4",
)  # fmt: skip
def positions_attend_to_positions(x, table, gain, bias, wq, wk):
    places = normal(table) * gain + bias
    return softmax((x @ wq) @ (x @ wk).swapaxes(1, 2) + (places @ wq) @ (places @ wk).T)


# Embeddings.

cases(
    {
        "a tied embedding": (
            lambda t, e, g: (normal(e[t]) * g) @ e.T,
            [TOKENS], {"e": "tied oi 11 8", "g": "vector o 8"}),
        "a tied embedding that is cut by constants first": (
            lambda t, e: tanh(e[:11][t]) @ e[:11].T, [TOKENS], {"e": "tied oi 12 8"}),
        "a tied embedding of unit rows": (
            lambda t, e: tanh((e / jnp.linalg.norm(e, axis=1, keepdims=True))[t]) @ e.T,
            [TOKENS], {"e": "tied oi 11 8"}),
        "a product with a one-hot": (
            lambda t, e: jax.nn.one_hot(t, 11) @ e, [TOKENS], {"e": "embedding io 11 8"}),
        "a sum of code books": (
            lambda t, e: jax.vmap(lambda e, t: e[t])(e, t).sum(0),
            [TOKENS], {"e": "embedding bio 2 11 8"}),
        "numbers that are looked up": (lambda t, e: e[t], [TOKENS], {"e": "vector o 11"}),
    }
)  # fmt: skip


@case(ROWS, enc="matrix io 5 4", code="embedding io 7 4", dec="matrix io 4 5")
def the_nearest_code_does_not_count(x, enc, code, dec):
    z = x @ enc
    distance = jnp.sum(code**2, 1) - 2 * z @ code.T
    found = code[jnp.argmin(distance, 1)]
    return tanh(z + lax.stop_gradient(found - z)) @ dec, lax.stop_gradient(z) - found


# Weights that are changed before they are used.

cases(
    {
        "weight norm": (
            lambda x, w, g: x @ (w * (g / jnp.linalg.norm(w, axis=0))),
            [ROWS], {"w": DENSE, "g": GAIN}),
        "weights without their mean": (
            lambda x, w: x @ ((w - w.mean(0)) / (w.std(0) + 1e-4)), [ROWS], {"w": DENSE}),
        "antisymmetric weights": (lambda x, w: x @ (w - w.T), [ROWS], {"w": "matrix io 5 5"}),
        "a triangle": (lambda x, w: x @ jnp.tril(w), [ROWS], {"w": "matrix io 5 5"}),
        "a kernel of squares": (lambda x, w: x @ jax.nn.softplus(w), [ROWS], {"w": DENSE}),
        "low rank": (
            lambda x, a, b: x @ (a @ b), [ROWS], {"a": "matrix io 5 2", "b": "matrix io 2 7"}),
        "low rank, added": (
            lambda x, w, a, b: x @ (w + 2.0 * (a @ b)),
            [ROWS], {"w": DENSE, "a": "matrix io 5 2", "b": "matrix io 2 7"}),
        "reduced over no axes": (
            lambda x, w: x @ lax.reduce(w, 0.0, lax.add, ()), [ROWS], {"w": DENSE}),
        "a constant index through jit": (
            lambda x, w: x @ jax.jit(lambda w, n: w[n - 1])(w, 2),
            [ROWS], {"w": "matrix bio 3 5 7"}),
        "constant indices, one by one": (
            lambda x, w: sum(tanh(x @ w[n]) for n in range(3)), [ROWS], {"w": "matrix bio 3 5 7"}),
    }
)  # fmt: skip


@case(ROWS, w=DENSE)
def spectral_norm(x, w):
    u = jnp.ones(7)
    for _ in range(2):
        v = lax.stop_gradient(w @ u / jnp.linalg.norm(w @ u))
        u = lax.stop_gradient(w.T @ v / jnp.linalg.norm(w.T @ v))
    return x @ (w / (v @ w @ u))


@case(SEQUENCE, rate="vector oo 8 3", start="vector oo 8 3", end="vector oo 8 3")
def a_moving_average(x, rate, start, end):
    powers = jnp.exp(jax.nn.log_sigmoid(rate)[..., None] * jnp.arange(9.0))
    kernel = jnp.sum((start * end)[..., None] * powers, 1)
    return jnp.fft.irfft(jnp.fft.rfft(x, 18, axis=1) * jnp.fft.rfft(kernel, 18).T, 18, axis=1)


@case(SEQUENCE, **dict.fromkeys(["a", "b", "c", "d"], "vector oo 8 3"), dt="vector o 8")
def a_state_space_as_a_kernel(x, a, b, c, d, dt):
    poles = lax.complex(-jnp.exp(a), b) * jnp.exp(dt)[:, None].astype(jnp.complex64)
    powers = jnp.exp(poles[..., None] * jnp.arange(9).astype(poles.dtype))
    kernel = einsum("hn,hnt->ht", lax.complex(c, d), powers)
    return jnp.fft.irfft(jnp.fft.rfft(x, 18, axis=1) * jnp.fft.rfft(kernel.real, 18).T, 18, axis=1)


@case(IMAGES, shape(6), style="matrix io 6 4", w="matrix ssio 3 3 4 5")
def a_kernel_that_data_scales(x, z, style, w):
    scaled = w * (z @ style)[:, None]
    return wave(scaled * lax.rsqrt(jnp.sum(scaled**2, (0, 1, 2)) + 1e-6), x)


# One parameter in several places.


@case(SEQUENCE, w="matrix bioo 3 8 2 4")
def queries_keys_and_values_lead(x, w):
    return attend(*einsum("btd,sdnh->sbnth", x, w))


@case(SEQUENCE, w="matrix iboo 8 3 2 4", b="vector boo 3 2 4")
def queries_keys_and_values_are_moved_ahead(x, w, b):
    return attend(*(einsum("btd,dsnh->sbnth", x, w) + b[:, None, :, None]))


@case(SEQUENCE, w="matrix io[2] 8 8", b="vector o[2] 8", out="matrix io 4 3")
def slices_of_one_kernel(x, w, b, out):
    gate, up = x @ w[:, :4] + b[:4], x @ w[:, 4:] + b[4:]
    return (jax.nn.silu(gate) * up) @ out


@case(SEQUENCE, w="matrix io[8,4,4] 8 16", wk="matrix io 4 3", wv="matrix io 4 8")
def splits_of_splits(x, w, wk, wv):
    q, kv = jnp.split(x @ w, 2, -1)
    k, v = jnp.split(kv, 2, -1)
    return tanh(q) * (v @ wv), relu(k) @ wk


@case(SEQUENCE, w="matrix io 8 6", out="matrix io 6 3")
def halves_that_are_put_together_again(x, w, out):
    a, b = jnp.split(x @ w, 2, -1)
    c, s = jnp.cos(jnp.arange(3.0)), jnp.sin(jnp.arange(3.0))
    return tanh(jnp.concatenate([a * c - b * s, b * c + a * s], -1)) @ out


@case(ROWS, shape(6, 4), w="matrix io[4] 9 16", b="vector o[4] 16")
def an_lstm_of_one_kernel(x, h, w, b):
    i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ w + b, 4, -1)
    return jax.nn.sigmoid(o) * tanh(jax.nn.sigmoid(f) + jax.nn.sigmoid(i) * tanh(g))


@case(ROWS, shape(6, 4), wx="matrix io[4] 5 16", wh="matrix io[4] 4 16", b="vector o[4] 16")
def an_lstm_of_two_kernels(x, h, wx, wh, b):
    i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ jnp.concatenate([wx, wh]) + b, 4, -1)
    return jax.nn.sigmoid(o) * tanh(jax.nn.sigmoid(f) + jax.nn.sigmoid(i) * tanh(g))


# Experts.

EXPERTS = {"router": "matrix io 5 3", "w": "matrix bio 3 5 7", "b": "vector bo 3 7"}


def routed(x, router):
    scores = softmax(x @ router)
    return jnp.max(scores, -1, keepdims=True), jnp.argmax(scores, -1)


@case(ROWS, **EXPERTS)
def experts_by_ragged_dot(x, router, w, b):
    gate, chosen = routed(x, router)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=3)
    return gate * (lax.ragged_dot(x[order], w, sizes) + b[chosen[order]])[jnp.argsort(order)]


@case(ROWS, **EXPERTS)
def experts_by_batch_axes(x, router, w, b):
    everyone = tanh(einsum("ni,eio->neo", x, w) + b)
    return einsum("neo,ne->no", everyone, softmax(x @ router))


@case(ROWS, **EXPERTS)
def experts_by_gather(x, router, w, b):
    gate, chosen = routed(x, router)
    return gate * (einsum("ni,nio->no", x, w[chosen]) + b[chosen])


@case(ROWS, **EXPERTS)
def experts_by_onehot(x, router, w, b):
    gate, chosen = routed(x, router)
    pick = jax.nn.one_hot(chosen, 3)
    return gate * (einsum("eni,eio->no", einsum("ne,ni->eni", pick, x), w) + pick @ b)


# Convolutions.

TORCH = ("NCHW", "OIHW", "NCHW")
cases(
    {
        "grouped": (lambda x, w: wave(w, x, groups=2), [IMAGES], {"w": "matrix ssio[2] 3 3 2 6"}),
        "grouped, as in PyTorch": (
            lambda x, w: wave(w, x.transpose(0, 3, 1, 2), TORCH, 2),
            [IMAGES], {"w": "matrix o[2]iss 6 2 3 3"}),
        "depthwise, as in Flax": (
            lambda x, w: wave(w, x, groups=4), [IMAGES], {"w": "matrix ssio[4] 3 3 1 4"}),
        "depthwise, as in Equinox": (
            lambda x, w: wave(w, x.transpose(0, 3, 1, 2), TORCH, 4),
            [IMAGES], {"w": "matrix o[4]iss 4 1 3 3"}),
        "depthwise, as in Keras": (
            lambda x, w: wave(w.reshape(3, 3, 1, 4), x, groups=4),
            [IMAGES], {"w": "matrix ssbo 3 3 4 1"}),
        "grouped, and split afterwards": (
            lambda x, w: jnp.multiply(*jnp.split(wave(w, x, groups=2), 2, -1)),
            [IMAGES], {"w": "matrix ssio[2] 3 3 2 6"}),
        "depthwise, and split afterwards": (
            lambda x, w: jnp.multiply(*jnp.split(wave(w, x, groups=4), 2, -1)),
            [IMAGES], {"w": "matrix ssio[4] 3 3 1 4"}),
        "grouped, written in two": (
            lambda x, w: jnp.concatenate(
                [wave(k, y) for k, y in zip(jnp.split(w, 2, -1), jnp.split(x, 2, -1), strict=True)],
                -1,
            ),
            [IMAGES], {"w": "matrix ssio[2] 3 3 2 6"}),
        "transposed": (
            lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME"),
            [IMAGES], {"w": "matrix ssio 3 3 4 5"}),
    }
)  # fmt: skip


# Control flow and transformations.


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


LAYERS = {"w": "matrix bio 3 5 5", "b": "vector bo 3 5"}
cases(
    {
        "scan": (
            lambda x, w, b: lax.scan(lambda x, p: (tanh(x @ p[0] + p[1]), None), x, (w, b))[0],
            [ROWS], LAYERS),
        "fori_loop": (
            lambda x, w, b: lax.fori_loop(0, 3, lambda n, x: tanh(x @ w[n] + b[n]), x),
            [ROWS], LAYERS),
        "while_loop": (
            lambda x, w: lax.while_loop(
                lambda s: s[0] < 3, lambda s: (s[0] + 1, tanh(s[1] @ w)), (0, x))[1],
            [ROWS], {"w": "matrix io 5 5"}),
        "cond": (
            lambda x, w: lax.cond(jnp.sum(x) > 0, lambda w: x @ w, lambda w: 0 * x @ w, w),
            [ROWS], {"w": DENSE}),
        "switch": (
            lambda x, w: lax.switch(
                jnp.argmax(x[0]), [lambda x, n=n: x @ w[n] for n in range(3)], x),
            [ROWS], {"w": "matrix bio 3 5 7"}),
        "checkpoint": (
            lambda x, w, b: jax.checkpoint(lambda w, b: relu(x @ w + b))(w, b),
            [ROWS], {"w": DENSE, "b": GAIN}),
        "custom_jvp": (lambda x, w: swish(x @ w), [ROWS], {"w": DENSE}),
        "custom_vjp": (linear, [ROWS], {"w": DENSE}),
        "custom_vjp, differentiated": (
            lambda x, w: jax.value_and_grad(lambda w: squares(linear(x, w)))(w)[0],
            [ROWS], {"w": DENSE}),
        "shard_map": (on_one_device, [ROWS], {"w": DENSE}),
        "a mapped ensemble": (
            lambda x, w, b, v: jax.vmap(lambda w, b, v: relu(x @ w + b) @ v)(w, b, v),
            [ROWS], {"w": "matrix bio 3 5 7", "b": "vector bo 3 7", "v": "matrix bio 3 7 4"}),
        "no entries": (
            lambda x, w, b: x @ w + b, [shape(0, 5)], {"w": "matrix io 5 0", "b": "vector o 0"}),
        "one input": (lambda x, w: x * w, [shape(6, 1)], {"w": "vector bo 1 7"}),
        "one output": (
            lambda x, w, b: x @ w + b, [ROWS], {"w": "matrix io 5 1", "b": "vector o 1"}),
        "forces": (
            lambda x, w, v: jax.grad(lambda x: jnp.sum(tanh(tanh(x @ w) @ v)))(x),
            [ROWS], {"w": DENSE, "v": "matrix io 7 3"}),
        "a gradient penalty": (
            lambda x, w, v: jax.value_and_grad(lambda x: jnp.sum(tanh(x @ w) @ v))(x),
            [ROWS], {"w": DENSE, "v": "matrix io 7 3"}),
        "a gradient that is only logged": (
            lambda x, w: lax.stop_gradient(jax.grad(lambda w: squares(x @ w))(w)).sum() + x @ w,
            [ROWS], {"w": DENSE}),
    }
)  # fmt: skip


@case(ROWS, shape(6, 3), w=DENSE, b=GAIN, v="matrix io 7 3")
def a_step_of_maml(x, y, **params):
    def loss(p):
        return squares(relu(x @ p["w"] + p["b"]) @ p["v"] - y)

    steps = jax.grad(loss)(params)
    return loss(jax.tree.map(lambda p, step: p - 0.1 * step, params, steps))


@pytest.mark.parametrize("name", CASES)
def test_it_is_followed(name):
    assert disagreements(*CASES[name]) == {}


def test_complex_leaves_are_read_but_have_no_norm():
    arrays, _ = spelled({"w": "matrix io 5 7", "b": "vector o 7"}, jnp.complex64)
    x = shape(6, 5, dtype=jnp.complex64)
    roles = roles_of(lambda p, x: jnp.sum(jnp.abs(x @ p["w"] + p["b"])), arrays, x)
    assert (roles["w"].kind, roles["w"].layout) == ("matrix", "io")
    assert (roles["b"].kind, roles["b"].layout) == ("vector", "o")
    assert all("complex" in role.problem for role in roles.values())
