"""The models of Flax's own examples, with the losses that they are trained with."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_models import GEMMA, LM1B, RESNET, WMT, Gemma, LanguageModel, ResNet, Translation
from leaves import cross_entropy, read, shape
from scion_jax import Sign, infer_norms

pytestmark = pytest.mark.unoptimized

TOKENS = shape(2, 5, dtype=jnp.int32)
LAST = Sign(30.0, zero_init=True)


def variables(model, *inputs):
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def of_gemma(model, tokens):
    return cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])


def test_gemma():
    model = nnx.eval_shape(lambda: Gemma(nnx.Rngs(0)))
    assert read(of_gemma, model, TOKENS, last=LAST) == GEMMA
    assert read(of_gemma, model, TOKENS)["embedder/embedding"] == "embedding io"
    norms = infer_norms(of_gemma, model, TOKENS, last=LAST).norms
    assert norms["last oi"] == Sign(30.0, layout="oi")  # an embedding does not start at zero


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


def test_imagenet():
    model = ResNet()

    def loss(params, statistics, images, classes):
        both = {"params": params, "batch_stats": statistics}
        logits, changed = model.apply(both, images, mutable=["batch_stats"])
        return cross_entropy(logits, classes), changed

    images = shape(2, 16, 16, 3)
    both = variables(model, images)
    inputs = both["batch_stats"], images, shape(2, dtype=jnp.int32)
    assert read(loss, both["params"], *inputs, last=LAST, has_aux=True) == RESNET
