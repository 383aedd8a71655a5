"""The README's code runs, as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import scion_jax

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()


def test_flax_example():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 32, rngs=rngs)
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.hidden = nnx.Linear(32, 32, rngs=rngs)
            self.head = nnx.Linear(32, 16, rngs=rngs, use_bias=False)

        def __call__(self, tokens):
            return self.head(jax.nn.relu(self.hidden(self.norm(self.embed(tokens)))))

    def loss_of(model, tokens):
        logits, following = model(tokens), (3 * tokens + 1) % 16
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    public = {name: getattr(scion_jax, name) for name in dir(scion_jax) if name[0] != "_"}
    names = {"Network": Network, "loss_of": loss_of, "batches": [jnp.arange(16)] * 40}
    names |= public | {"jax": jax, "nnx": nnx}
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(example, names)
    assert float(names["loss"]) < 0.1  # from log 16 = 2.77
