"""Programs that tempt to a wrong reading: each parameter is read rightly, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from leaves import shape, squares
from scion_jax import BiasRMS, ColNorm, infer_norms
from test_follows import (
    DENSE,
    GAIN,
    IMAGES,
    LABELS,
    ROWS,
    SEQUENCE,
    TOKENS,
    attend,
    disagreements,
    einsum,
    normal,
    relu,
    roles_of,
    softmax,
    spelled,
    tanh,
    wave,
)  # fmt: skip

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

KEY = jax.eval_shape(lambda: jax.random.key(0))
CONSTANT = np.sin(np.arange(45.0, dtype=np.float32)).reshape(9, 5)
ORDER = np.array([3, 1, 0, 2, 4])
OFFSETS = np.arange(9)[:, None] - np.arange(9) + 8
# Layouts of equal meaning are written with `|`; "-" says that only "unknown" is right.
QUERY = {"q": "vector bo | vector oo 7 5", "wq": "matrix io 5 6", "wk": "matrix io 8 6"}
TURNED = {"q": "vector bo | vector oo 7 5", "wq": "matrix oi 6 5", "wk": "matrix oi 6 8"}
HEADS = QUERY | {"wq": "matrix ioo 5 2 3", "wk": "matrix ioo 8 2 3"}
MIXTURE = {"w": "matrix bio 3 5 7", "g": "matrix io 5 3"}
NOISY = {"w": DENSE, "d": "matrix io 5 35"}
KERNEL, TWO = "matrix io 6 5", {"w": "- 5 5"}


def heads_apart(x, w):
    return einsum("...i,ihd->...hd", x, w)


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


TRAPS = {
    # Learned queries through a kernel, then keys: both sides of the kernel would swap.
    "queries": (
        lambda x, q, wq, wk: softmax(einsum("qk,bsk->bqs", q @ wq, x @ wk)), [SEQUENCE], QUERY),
    "queries, by attention": (
        lambda x, q, wq, wk: attend(q @ wq, x @ wk, x), [SEQUENCE], QUERY),
    "one query": (
        lambda x, q, wq, wk: softmax((x @ wk) @ (q @ wq)),
        [SEQUENCE], QUERY | {"q": "vector o 5"}),
    "queries, mapped": (
        lambda x, q, wq, wk: softmax(jax.vmap(lambda q: wq @ q)(q) @ (x @ wk.T).swapaxes(1, 2)),
        [SEQUENCE], TURNED),
    "queries, transposed": (
        lambda x, q, wq, wk: softmax((wq @ q.T).T @ (x @ wk.T).swapaxes(1, 2)),
        [SEQUENCE], TURNED),
    "queries of heads": (
        lambda x, q, wq, wk: einsum("qhk,bshk->bhqs", heads_apart(q, wq), heads_apart(x, wk)),
        [SEQUENCE], HEADS),
    "queries with a bias": (
        lambda x, q, wq, wk, b: softmax((q @ wq + b) @ (x @ wk).swapaxes(1, 2)),
        [SEQUENCE], QUERY | {"b": "vector o 6"}),
    "queries that are bent": (
        lambda x, q, wq, wk: softmax(relu(q @ wq) @ (x @ wk).swapaxes(1, 2)), [SEQUENCE], QUERY),
    "queries that are normed by a gain": (
        lambda x, q, wq, wk, g: softmax((normal(q) * g) @ wq @ (x @ wk).swapaxes(1, 2)),
        [SEQUENCE], QUERY | {"g": "vector o 5"}),
    "queries for keys without a kernel": (
        lambda x, q, w: softmax((q @ w) @ x.swapaxes(1, 2)),
        [SEQUENCE], {"q": "vector bo | vector oo 7 5", "w": "matrix io 5 8"}),
    "a query for each image": (
        lambda x, q, wq, wk: attend(jnp.broadcast_to(q, (2, 1, 5)) @ wq, x @ wk, x),
        [SEQUENCE], QUERY | {"q": "vector boo | vector bbo | vector ooo 1 1 5"}),
    # Matrices that data mixes.
    "a mixture": (mixed, [ROWS], MIXTURE),
    "a mixture at once": (
        lambda x, w, g: einsum("ni,ne,eio->no", x, softmax(x @ g), w), [ROWS], MIXTURE),
    "a mixture of an outer product": (
        lambda x, w, g: einsum("nie,eio->no", x[..., None] * softmax(x @ g)[:, None], w),
        [ROWS], MIXTURE),
    "a mixture, summed": (
        lambda x, w, g: einsum("ni,nio->no", x, (softmax(x @ g)[..., None, None] * w).sum(1)),
        [ROWS], MIXTURE),
    "a mixture for all rows": (
        lambda x, w, g: x @ jnp.tensordot(softmax(x.mean(0) @ g), w, 1), [ROWS], MIXTURE),
    "a mixture, mapped": (
        lambda x, w, g: jax.vmap(lambda x: x @ jnp.tensordot(softmax(x @ g), w, 1))(x),
        [ROWS], MIXTURE),
    "a mixture with biases": (
        lambda x, w, g, b: mixed(x, w, g) + softmax(x @ g) @ b,
        [ROWS], MIXTURE | {"b": "vector bo | matrix io 3 7"}),
    "a mixture of convolutions": (
        lambda x, w, g: wave(jnp.tensordot(softmax(x.mean((0, 1, 2)) @ g), w, 1), x),
        [IMAGES], {"w": "matrix bssio 3 3 3 4 5", "g": "matrix io 4 3"}),
    # A weight and something that data made, or a key.
    "W + Δ(x)": (
        lambda x, w, d: einsum("ni,nio->no", x, w + (x @ d).reshape(6, 5, 7)), [ROWS], NOISY),
    "W + Δ of all": (lambda x, w, d: x @ (w + (x.mean(0) @ d).reshape(5, 7)), [ROWS], NOISY),
    "W + u(x) v(x)ᵀ": (
        lambda x, w, u, v: jax.vmap(lambda x: x @ (w + jnp.outer(x @ u, x @ v)))(x),
        [ROWS], {"w": DENSE, "u": "matrix io 5 5", "v": DENSE}),
    "W + an input": (lambda x, d, w: x @ (w + d), [ROWS, shape(5, 7)], {"w": DENSE}),
    "Wᵀ + an input": (
        lambda x, d, w: x @ (w.T + 0.1 * d), [ROWS, shape(5, 7)], {"w": "matrix oi 7 5"}),
    "W + noise": (
        lambda x, key, w: x @ (w + jax.random.normal(key, (5, 7))), [ROWS, KEY], {"w": DENSE}),
    "a window + noise": (
        lambda x, key, w: wave(w + jax.random.normal(key, w.shape), x),
        [IMAGES, KEY], {"w": "matrix ssio 3 3 4 5"}),
    "Bayes by backpropagation": (
        lambda x, key, w, r: x @ (w + jax.nn.softplus(r) * jax.random.normal(key, (5, 7))),
        [ROWS, KEY], {"w": DENSE, "r": DENSE}),
    "dropconnect": (
        lambda x, key, w: x @ jnp.where(jax.random.bernoulli(key, 0.5, (5, 7)), 2 * w, 0),
        [ROWS, KEY], {"w": DENSE}),
    "weights that learn as they go": (
        fast_weights, [shape(9, 6)],
        {"start": DENSE, "value": "matrix io 6 7", "key": KERNEL, "query": KERNEL}),
    # Two layers in one.
    "two layers along the input axis": (
        lambda x, w: tanh(x @ w[:5]) @ w[5:], [ROWS], {"w": "matrix i[5,7]o 12 7"}),
    "two layers along the output axis": (
        lambda x, w: tanh(x @ w[:, :5]) @ w[:, 5:], [ROWS], {"w": "matrix io[2] 5 10"}),
    "two layers, the second of them turned": (
        lambda x, w: tanh(x @ w[:, :5]) @ w[:, 5:].T, [ROWS], {"w": "- 5 10"}),
    "two layers in a stack, the first of them turned": (
        lambda x, w: tanh(x @ w[0].T) @ w[1], [ROWS], {"w": "- 2 5 5"}),
    "a kernel with its bias as a row": (
        lambda x, w: tanh(x @ w[:5] + w[5]), [ROWS], {"w": "matrix io 6 7"}),
    "a kernel with its bias as a column": (
        lambda x, w: tanh(w[:, :5] @ x.T + w[:, 5:]), [ROWS], {"w": "matrix oi 7 6"}),
    # Decompositions and powers.
    "expm": (lambda x, w: x @ jax.scipy.linalg.expm(w - w.T), [ROWS], TWO),
    "QR": (lambda x, w: x @ jnp.linalg.qr(w)[0], [ROWS], TWO),
    "Cholesky": (lambda x, w: x @ jnp.linalg.cholesky(w @ w.T + jnp.eye(5)), [ROWS], TWO),
    "solve": (lambda x, w: x @ jnp.linalg.solve(jnp.eye(5) + w, jnp.eye(5) - w), [ROWS], TWO),
    "solve for data": (lambda x, w: jnp.linalg.solve(w, x.T), [ROWS], TWO),
    "solve a triangle": (
        lambda x, w: jax.scipy.linalg.solve_triangular(w, x.T, lower=True), [ROWS], TWO),
    "inverse": (lambda x, w: x @ jnp.linalg.inv(w), [ROWS], TWO),
    "determinant": (lambda x, w: x * jnp.linalg.det(w), [ROWS], TWO),
    "power": (lambda x, w: x @ jnp.linalg.matrix_power(w, 3), [ROWS], TWO),
    "square": (lambda x, w: x @ (w @ w), [ROWS], TWO),
    "sort": (lambda x, w: x @ jnp.sort(w, 1), [ROWS], TWO),
    "sum of all before": (lambda x, w: x @ jnp.cumsum(w, 0), [ROWS], {"w": DENSE}),
    "callback": (
        lambda x, w: x @ jax.pure_callback(lambda w: w, shape(5, 7), w), [ROWS], {"w": DENSE}),
    # Both ways, or for two purposes.
    "both sides": (lambda x, w: (tanh(x @ w), tanh(x @ w.T)), [ROWS], TWO),
    "added and multiplied": (lambda x, w: (tanh(x + w[0]), x @ w), [ROWS], TWO),
    "looked up, and a hidden kernel": (
        lambda t, w, v: tanh(w[t] @ w) @ v, [TOKENS], {"w": "tied io 7 7", "v": "matrix io 7 3"}),
    "an autoencoder": (autoencoder, [ROWS], {"w": "- 5 7", "b": GAIN}),
    "a gain of two axes": (lambda x, w: x * w, [ROWS], {"w": "vector oo 6 5"}),
    # Cut and ordered channels.
    "cut channels of a residual stream": (
        cut_channels, [TOKENS],
        {"e": "embedding io 11 8", "w": "matrix io 8 8", "v": "matrix io 8 3"}),
    "interleaved halves": (
        lambda x, w, v: ((x @ w)[:, ::2] * (x @ w)[:, 1::2]) @ v,
        [ROWS], {"w": "matrix io 5 8", "v": "matrix io 4 3"}),
    "shuffled channels": (
        lambda x, w, v: (x @ w).reshape(6, 2, 4).swapaxes(1, 2).reshape(6, 8) @ v,
        [ROWS], {"w": "matrix io 5 8", "v": "matrix io 8 3"}),
    "permuted rows": (lambda x, w: x[:, ORDER] @ w[ORDER], [ROWS], {"w": DENSE}),
    "taken rows": (lambda x, w: x @ jnp.take(w, ORDER, axis=0), [ROWS], {"w": DENSE}),
    "permuted columns": (lambda x, w: x @ w[:, ORDER], [ROWS], {"w": "matrix io 5 5"}),
    "chosen rows": (lambda x, w: x[:, :2] @ w[ORDER[:2]], [ROWS], {"w": DENSE}),
    "column by column": (
        lambda x, w: tanh(jnp.stack([x @ w[:, n] for n in range(7)], 1)), [ROWS], {"w": DENSE}),
    # Products of parameters.
    "LoRA": (
        lambda x, w, a, b: x @ (w + a @ b),
        [ROWS], {"w": DENSE, "a": "matrix io 5 2", "b": "matrix io 2 7"}),
    "LoRA in PyTorch's order": (
        lambda x, w, a, b: x @ (w + b @ a).T,
        [ROWS], {"w": "matrix oi 7 5", "a": "matrix oi 2 5", "b": "matrix oi 7 2"}),
    "LoRA alone, in PyTorch's order": (
        lambda x, a, b: x @ (b @ a).T, [ROWS], {"a": "matrix oi 2 5", "b": "matrix oi 7 2"}),
    "LoRA of an embedding": (
        lambda t, e, a, b: (e + a @ b)[t],
        [TOKENS], {"e": "embedding io 11 8", "a": "embedding io 11 2", "b": "matrix io 2 8"}),
    "three factors": (
        lambda x, a, b, c: x @ (a @ b @ c),
        [ROWS], {"a": "matrix io 5 3", "b": "matrix io 3 4", "c": "matrix io 4 7"}),
    "a diagonal between factors": (
        lambda x, a, s, b: x @ (a @ jnp.diag(s) @ b),
        [ROWS], {"a": "matrix io 5 3", "s": "vector o 3", "b": "matrix io 3 7"}),
    "Kronecker": (
        lambda x, a, b: jnp.kron(a, b) @ x.T,
        [shape(6, 6)], {"a": "matrix oi 3 2", "b": "matrix oi 4 3"}),
    "Glow's triangles": (
        glow, [ROWS], {"low": "matrix io 5 5", "up": "matrix io 5 5", "s": "vector o 5"}),
    # Constants where data would be expected.
    "positions of Transformer-XL": (
        relative, [ROWS], {"q": "matrix ioo 5 2 3", "r": "matrix ioo 5 2 3"}),
    "positions of Transformer-XL, one head": (
        lambda x, q, r: softmax((x @ q) @ (CONSTANT @ r).T), [ROWS], {"q": DENSE, "r": DENSE}),
    "a network of positions": (
        lambda x, v, w: x * (jnp.sin(CONSTANT @ v) @ w),
        [SEQUENCE], {"v": "matrix io 5 7", "w": "matrix io 7 8"}),
    "an average by constants": (
        lambda x, w: x @ jnp.tensordot(CONSTANT[0, :3], w, 1), [ROWS], {"w": "matrix bio 3 5 7"}),
    # Tables.
    "positions, cut": (lambda x, p: x + p[:9], [SEQUENCE], {"p": "vector bo 12 8"}),
    "positions, all of them": (lambda x, p: x + p, [SEQUENCE], {"p": "vector bo | vector oo 9 8"}),
    "positions, counted": (
        lambda x, p: x + p[jnp.arange(9)], [SEQUENCE], {"p": "vector bo | embedding io 12 8"}),
    "positions, as data": (
        lambda x, t, p: x + p[t], [SEQUENCE, TOKENS], {"p": "embedding io 12 8"}),
    "relative positions": (
        lambda x, p: softmax(x[:, None] + p[OFFSETS].transpose(2, 0, 1)),
        [shape(2, 9, 9)], {"p": "vector bo | embedding io 17 3"}),
    "positions of Shaw": (
        lambda x, p: softmax(einsum("btd,tsd->bts", x, p[OFFSETS])),
        [SEQUENCE], {"p": "vector bo | embedding io | matrix oi 17 8"}),
    "scores of pairs": (
        lambda y, p: p[y[:-1], y[1:]], [LABELS], {"p": "vector bo | vector oo 3 3"}),
    "bilinear": (
        lambda x, y, w: einsum("ni,ij,nj->n", x, w, y),
        [ROWS, shape(6, 7)], {"w": "matrix io | matrix oi 5 7"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_right_or_unknown(name):
    assert disagreements(*TRAPS[name], "unknown") == {}


REFUSED = {
    "a tied autoencoder": (autoencoder, {"w": "5 7", "b": "7"}, "w", "uses disagree.*io.*oi"),
    "several parameters in one vector": (unraveled, {"flat": "42"}, "flat", "several parameters"),
    "only its mean": (lambda x, w: x * w.mean(), {"w": "5 7"}, "w", "only a statistic"),
    "only a penalty": (lambda x, w: (x, w), {"w": "5 7"}, "w", "only a statistic"),
    "a constant times a kernel": (
        lambda x, w: x + CONSTANT[:6] @ w, {"w": "5 5"}, "w", "a constant, and inputs must be arg"),
    "a decomposition": (lambda x, w: x @ jnp.linalg.qr(w)[0], {"w": "5 5"}, "w", "qr is no oper"),
    "queries times a kernel": (
        lambda x, q, w: softmax((q @ w) @ x.T), {"q": "7 4", "w": "4 5"}, "w",
        "meets another parameter"),
    "rows one by one": (
        lambda x, w: jnp.stack([x @ w[:, n] for n in range(7)]), {"w": "5 7"}, "w", "one by one"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_words(name):
    function, params, path, words = REFUSED[name]
    arrays, _ = spelled({name: f"- {sizes}" for name, sizes in params.items()})

    def loss(params, x):
        return squares(function(x, **params))

    role = roles_of(loss, arrays, ROWS)[path]
    assert role.kind == "unknown"
    with pytest.raises(ValueError, match=rf"(?s)'{path}' of shape.*{words}.*rules="):
        infer_norms(loss, arrays, ROWS, last=None)


@pytest.mark.parametrize("cast", [lambda w: w.astype(jnp.int8).astype(jnp.float32), jnp.sign])
def test_integers_of_a_parameter_are_no_use_of_it(cast):
    roles = roles_of(lambda p, x: squares(x @ cast(p["w"])), {"w": shape(5, 7)}, ROWS)
    assert roles["w"].kind == "unused"


def test_tables_of_positions_have_one_norm_however_they_are_read():
    rows, columns = BiasRMS(layout="bo"), ColNorm(layout="io")
    table = jnp.asarray(np.random.default_rng(0).normal(size=(12, 8)), jnp.float32)
    np.testing.assert_allclose(rows.lmo(table), columns.lmo(table), rtol=1e-6)
    np.testing.assert_allclose(rows.gauge(table), columns.gauge(table), rtol=1e-6)
    np.testing.assert_allclose(rows.dual_norm(table), columns.dual_norm(table), rtol=1e-6)
