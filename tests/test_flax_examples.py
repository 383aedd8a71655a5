"""The models of Flax's own examples: every leaf's step, and no error but those that are due."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from flax_by_hand import check
from flax_examples import (
    GEMMA,
    LM1B,
    RESNET,
    WMT,
    Gemma,
    LanguageModel,
    ResNet,
    Translation,
)
from scion_jax import (
    ColNorm,
    ExactPolar,
    Sign,
    Spectral,
    flax_norms,
    init_params,
)

pytestmark = pytest.mark.unoptimized

HIDDEN = Spectral(orthogonalizer=ExactPolar())
POSITIONS = {"pos_embedding": ColNorm(layout="bio")}
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
IMAGE = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)


def test_gemma():
    model = nnx.eval_shape(lambda: Gemma(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"(?s)tied.*'embedder/embedding' \(20, 16\)"):
        flax_norms(model, last={})
    norms, labels = flax_norms(model, hidden=HIDDEN, last={"embedder": Sign(30.0)})
    assert norms["last 'embedder' oi"] == Sign(30.0, layout="oi")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    del params["embedder"]
    check("gemma", params, norms, labels, GEMMA)


def test_gemma_keeps_its_zero_gains():
    model = Gemma(nnx.Rngs(0))
    norms, labels = flax_norms(model, last={"embedder": Sign(30.0)})
    params = init_params(jax.random.key(0), nnx.state(model, nnx.Param), norms, labels)
    assert not params["final_norm"]["scale"].get_value().any()


def test_lm1b():
    model = LanguageModel()
    with pytest.raises(ValueError, match=r"'posembed/pos_embedding' \(1, 5, 16\) of Positions"):
        flax_norms(model, TOKENS, last={"logitdense": Sign()})
    norms, labels = flax_norms(model, TOKENS, hidden=HIDDEN, rules=POSITIONS, last={})
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    del params["Embed_0"], params["posembed"]
    check("lm1b", params, norms, labels, LM1B)


def test_wmt():
    model = Translation()
    with pytest.raises(ValueError, match=r"(?s)tied.*'shared_embedding/embedding'"):
        flax_norms(model, TOKENS, TOKENS, rules=POSITIONS, last={})
    last = {"shared_embedding": Sign()}
    norms, labels = flax_norms(model, TOKENS, TOKENS, hidden=HIDDEN, rules=POSITIONS, last=last)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS, TOKENS)["params"]
    del params["shared_embedding"], params["positions"]
    check("wmt", params, norms, labels, WMT)


def test_imagenet():
    model = ResNet()
    norms, labels = flax_norms(model, IMAGE, train=True, hidden=HIDDEN, last={})
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones(IMAGE.shape))["params"]
    check("imagenet", params, norms, labels, RESNET)
    params = init_params(jax.random.key(0), params, norms, labels)
    assert not params["Bottleneck_0"]["BatchNorm_2"]["scale"].any()
    assert (params["Bottleneck_0"]["BatchNorm_1"]["scale"] == 1).all()
