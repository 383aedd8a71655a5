"""Programs drawn at random, whose parameters are known by construction; and reading's speed."""

import random
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from leaves import cross_entropy, shape
from test_follows import normal, roles_of

from random_programs import Maker
from scion_jax.reading import read_roles

pytestmark = pytest.mark.unoptimized

CHUNKS = [range(start, start + 30) for start in range(0, 300, 30)]
MANY = [range(start, start + 500) for start in range(300, 10_300, 500)]
MOST_UNKNOWN = 0.02


def fits(role, kind, letters):
    """Whether a role is the expected one; axes of one entry may be anything."""
    layout = role.layout if "[" in letters else re.sub(r"\[.*?\]", "", role.layout)
    if role.kind != kind:
        return False
    pairs = zip(layout, letters, role.shape, strict=False)
    alike = all(found == right or size == 1 for found, right, size in pairs)
    return layout == letters or (len(layout) == len(letters) and alike)


def check(seeds):
    wrong, unknown, count = [], 0, 0
    for seed in seeds:
        program = Maker(seed).make()
        for role in roles_of(program, program.params, *program.inputs).values():
            count += 1
            unknown += role.kind == "unknown"
            if role.kind != "unknown" and not fits(role, *program.expected[role.path]):
                wrong.append((seed, role, program.expected[role.path]))
    assert not wrong
    assert unknown <= MOST_UNKNOWN * count


@pytest.mark.parametrize("seeds", CHUNKS, ids=str)
def test_no_wrong_answer(seeds):
    check(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", MANY, ids=str)
def test_no_wrong_answer_in_many(seeds):
    check(seeds)


@pytest.mark.parametrize("seeds", [range(start, start + 10) for start in range(0, 40, 10)], ids=str)
def test_unused_if_and_only_if_the_gradient_is_zero(seeds):
    """Some parameters are cut off, each in one of the ways that let no gradient through."""
    cuts = [lax.stop_gradient, jnp.sign, lambda w: (8 * w).astype(jnp.int8).astype(w.dtype)]
    for seed in seeds:
        program, draw = Maker(seed).make(), random.Random(seed)
        names = [name for name in program.params if draw.random() < 0.3]
        cut = {name: draw.choice(cuts) for name in names}

        def loss(params, *inputs, cut=cut, program=program):
            return program({n: cut.get(n, jnp.array)(w / 4) for n, w in params.items()}, *inputs)

        roles = roles_of(loss, program.params, *program.inputs)
        for name, gradient in jax.jit(jax.grad(loss))(program.params, *program.inputs).items():
            assert (roles[name].kind == "unused") == bool(np.all(gradient == 0)), (seed, name)
            assert name in cut or roles[name].kind != "unused"


# Speed.


def gpt_2(params, tokens):
    x = params["words"][tokens] + params["places"][: tokens.shape[1]]
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    for block in params["blocks"]:
        h = normal(x) * block["g1"] + block["b1"]
        qkv = jnp.split(h @ block["qkv"] + block["qkv_b"], 3, -1)
        q, k, v = (a.reshape(*a.shape[:2], 25, 64) for a in qkv)
        scores = jnp.where(causal, jnp.einsum("bthd,bshd->bhts", q, k) / 8.0, -1e9)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        x = x + mixed.reshape(x.shape) @ block["out"] + block["out_b"]
        h = normal(x) * block["g2"] + block["b2"]
        x = x + jax.nn.gelu(h @ block["up"] + block["up_b"]) @ block["down"] + block["down_b"]
    x = normal(x) * params["g"] + params["b"]
    return cross_entropy(x @ params["words"].T, tokens)


def gpt_2_xl():
    d = 1600
    block = {name: shape(d) for name in ("g1", "b1", "g2", "b2", "out_b", "down_b")}
    block |= {"qkv": shape(d, 3 * d), "qkv_b": shape(3 * d), "out": shape(d, d)}
    block |= {"up": shape(d, 4 * d), "up_b": shape(4 * d), "down": shape(4 * d, d)}
    ends = {"words": shape(50257, d), "places": shape(1024, d), "g": shape(d), "b": shape(d)}
    return {**ends, "blocks": [block] * 48}


def rotated(x):
    a, b = jnp.split(x, 2, -1)
    angle = jnp.arange(float(x.shape[1]))[:, None, None] * jnp.exp(-jnp.arange(64.0) / 5)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def llama(params, tokens):
    def norm(x, gain):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain

    x = params["words"][tokens]
    for block in params["blocks"]:
        h = norm(x, block["g1"])
        q, k, v = ((h @ block[n]).reshape(*h.shape[:2], -1, 128) for n in "qkv")
        mixed = jax.nn.dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ block["out"]
        h = norm(x, block["g2"])
        x = x + (jax.nn.silu(h @ block["gate"]) * (h @ block["up"])) @ block["down"]
    return cross_entropy(norm(x, params["g"]) @ params["head"], tokens)


def llama_8b():
    d, wide = 4096, 14336
    block = {"g1": shape(d), "g2": shape(d), "q": shape(d, d), "out": shape(d, d)}
    block |= {"k": shape(d, 1024), "v": shape(d, 1024)}
    block |= {"gate": shape(d, wide), "up": shape(d, wide), "down": shape(wide, d)}
    ends = {"words": shape(128256, d), "g": shape(d), "head": shape(d, 128256)}
    return {**ends, "blocks": [block] * 32}


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@pytest.mark.slow
def test_reading_takes_half_as_long_as_tracing_at_most():
    params, tokens = gpt_2_xl(), shape(2, 1024, dtype=jnp.int32)
    tracing, reading = [], []
    for _ in range(5):
        # A function of its own each time, or the second would not be traced.
        tracing.append(seconds(jax.make_jaxpr(lambda p, t: gpt_2(p, t)), params, tokens))
        reading.append(seconds(read_roles, lambda p, t: gpt_2(p, t), params, tokens))
    assert statistics.median(reading) <= 1.5 * statistics.median(tracing)
    roles = roles_of(gpt_2, params, tokens)
    assert (roles["words"].kind, roles["words"].last) == ("tied", True)
    assert {roles[f"blocks/{n}/qkv"].layout for n in range(48)} == {"io[3]"}
    assert "unknown" not in {role.kind for role in roles.values()}


@pytest.mark.slow
def test_a_llama_is_read_within_seconds():
    params, tokens = llama_8b(), shape(1, 8192, dtype=jnp.int32)
    times = [seconds(read_roles, lambda p, t: llama(p, t), params, tokens) for _ in range(3)]
    assert min(times) <= 5
    roles = roles_of(llama, params, tokens)
    assert {role.layout for role in roles.values()} == {"io", "o"}
    assert [path for path, role in roles.items() if role.last] == ["head"]
