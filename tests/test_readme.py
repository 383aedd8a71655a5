"""The README's code runs, as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

from scion_jax import Spectral, clipped_scion

pytestmark = pytest.mark.fast

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def blocks():
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_flax_example():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 32, rngs=rngs)
            self.hidden = nnx.Linear(32, 64, rngs=rngs)
            self.head = nnx.Linear(64, 16, rngs=rngs, use_bias=False)

        def __call__(self, tokens):
            return self.head(jax.nn.relu(self.hidden(self.embed(tokens))))

    def loss_of(model, tokens):
        logits, following = model(tokens), (3 * tokens + 1) % 16
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    names = {"Network": Network, "loss_of": loss_of, "batches": [jnp.arange(16)] * 40}
    example = blocks()[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(example, names)
    assert float(names["loss"]) < 0.1  # from log 16 = 2.77


def test_choosing_rho(capsys):
    params = {"w": jnp.ones((2, 2))}
    names = {
        "optax": optax,
        "clipped_scion": clipped_scion,
        "norms": Spectral(),
        "labels": None,
        "params": params,
        "gradients": params,
    }
    exec(blocks()[1], names)
    pairing, factor = capsys.readouterr().out.split()
    assert float(pairing) > 0
    assert float(factor) == 1


def test_own_norm():
    names = {}
    exec(blocks()[2], names)
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
