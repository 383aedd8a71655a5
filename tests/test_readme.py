"""The README's code runs, as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import scion_jax
from scion_jax import Spectral, clipped_scion, describe

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def blocks():
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_flax_example():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 32, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.hidden = nnx.Linear(32, 32, rngs=rngs)
            self.head = nnx.Linear(32, 16, rngs=rngs, use_bias=False)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(x[:, None])[:, 0]
            return self.head(jax.nn.relu(self.hidden(self.norm(x))))

    def loss_of(model, tokens):
        logits, following = model(tokens), (3 * tokens + 1) % 16
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    public = {name: getattr(scion_jax, name) for name in dir(scion_jax) if name[0] != "_"}
    names = {"Network": Network, "loss_of": loss_of, "batches": [jnp.arange(16)] * 40}
    names |= public | {"jax": jax, "nnx": nnx}
    example = blocks()[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(example, names)
    assert float(names["loss"]) < 0.1  # from log 16 = 2.77


def test_choosing_rho_and_what_to_log(capsys):
    params = {"w": jnp.ones((2, 2))}
    public = {name: getattr(scion_jax, name) for name in dir(scion_jax) if name[0] != "_"}
    names = public | {"optax": optax, "norms": Spectral(), "labels": None}
    names |= {"params": params, "gradients": params}
    exec(blocks()[2], names)
    assert float(capsys.readouterr().out) > 0
    exec(blocks()[3], names)
    assert names["logged"].keys() == {"gauge/w", "pairing/w"}
    assert float(names["logged"]["gauge/w"]) == pytest.approx(2, rel=0.01)


def test_own_norm():
    names = {}
    exec(blocks()[4], names)
    norm = names["EntrySum"](3.0, layout="bio")
    d = jax.random.normal(jax.random.key(0), (2, 3, 4))
    v = norm.lmo(d)
    assert float(norm.gauge(v)) == pytest.approx(1)
    assert float(jnp.vdot(d, v)) == pytest.approx(float(norm.dual_norm(d)))
    assert not bool(jnp.any(norm.lmo(jnp.zeros((2, 3, 4)))))
    params = norm.init(jax.random.key(0), (2, 3, 4))
    optimizer = clipped_scion(0.1, norm, rho=1.0, short_step=True)
    updates, _ = optimizer.update(d, optimizer.init(params), params)
    assert updates.shape == d.shape
    assert str(describe(params, norm)).endswith("–")  # it does not say how long its steps are
