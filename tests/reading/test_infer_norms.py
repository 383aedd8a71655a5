"""Which norm a parameter gets, what is refused and in which words, and what makes no difference."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scion_jax import BiasRMS, ColNorm, Euclidean, RowNorm, Sign, Spectral, infer_norms
from tests.reading.support import cross_entropy, read, shape, squares

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

TOKENS, FEATURES = shape(2, 5, dtype=jnp.int32), shape(2, 4)
LANGUAGE = {
    "embed": {"embedding": shape(12, 8)},
    "gain": shape(8),
    "hidden": {"bias": shape(8), "kernel": shape(8, 8)},
    "head": {"bias": shape(12), "kernel": shape(8, 12)},
}
TWO = {"a": shape(4, 8), "b": shape(8, 3)}
MLP = {"a": shape(4, 8), "b": shape(8), "c": shape(8, 3)}
EXPECTED = {"a": "io", "b": "o", "c": "last io"}


def language(params, tokens):
    x = params["embed"]["embedding"][tokens] * params["gain"]
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return cross_entropy(logits[:, :-1], tokens[:, 1:])


def two_layers(params, x):
    return squares(jax.nn.relu(x @ params["a"]) @ params["b"])


def mlp(params, x):
    return squares(jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"])


def chosen(*args, **options):
    """The norm of every leaf, by path."""
    assignment = infer_norms(*args, **{"last": None, **options})
    return {entry.path: entry.norm for entry in assignment.entries}


def test_kinds():
    options = {"hidden": Spectral(2.0), "vectors": BiasRMS(0.5), "embeddings": ColNorm(3.0)}
    assert chosen(language, LANGUAGE, TOKENS, last=Sign(50.0), **options) == {
        "embed/embedding": ColNorm(3.0, layout="io"),
        "gain": BiasRMS(0.5, layout="o"),
        "hidden/kernel": Spectral(2.0, layout="io"),
        "hidden/bias": BiasRMS(0.5, layout="o"),
        "head/kernel": Sign(50.0, layout="io"),
        "head/bias": BiasRMS(0.5, layout="o"),
    }
    assert chosen(language, LANGUAGE, TOKENS)["head/kernel"] == Spectral(layout="io")


@pytest.mark.parametrize(
    ("options", "norm"),
    [
        ({}, Spectral(max=True, layout="io")),
        ({"hidden": Spectral(3.0)}, Spectral(3.0, max=True, layout="io")),
        ({"hidden": RowNorm(3.0)}, RowNorm(3.0, layout="io")),
        ({"first": Euclidean(2.0)}, Euclidean(2.0, layout="io")),
    ],
)
def test_the_first_layer_takes_the_inputs(options, norm):
    found = chosen(two_layers, TWO, FEATURES, **options)
    assert found["a"] == norm
    assert type(found["b"]) is type(options.get("hidden", Spectral()))
    assert not getattr(found["b"], "max", False)


def test_first_pattern_wins_and_layouts_may_be_given():
    rules = {"hidden/kernel": RowNorm(layout="oi"), "gain": Euclidean(3.0), "^h": Spectral(7.0)}
    found = chosen(language, LANGUAGE, TOKENS, rules=rules)
    assert found["hidden/kernel"] == RowNorm(layout="oi")
    assert found["head/kernel"] == Spectral(7.0, layout="io")
    # Patterns mean matrices; only one that finds none means vectors.
    assert found["head/bias"] == BiasRMS(layout="o")
    assert found["gain"] == Euclidean(3.0, layout="o")
    wrapped = {"params": LANGUAGE}
    within = chosen(lambda p, t: language(p["params"], t), wrapped, TOKENS, rules=rules)
    assert {path.removeprefix("params/"): norm for path, norm in within.items()} == found
    # Labels are not mixed up by patterns that look like them.
    rules = {"hidden": Spectral(5.0), "embed": ColNorm(2.0)}
    found = chosen(language, LANGUAGE, TOKENS, hidden=Spectral(3.0), rules=rules, last=Sign())
    assert found["hidden/kernel"] == Spectral(5.0, layout="io")
    assert found["embed/embedding"] == ColNorm(2.0, layout="io")


def test_last():
    def two_heads(params, x):
        x = jax.nn.relu(x @ params["body"])
        return squares([x @ params["policy"], x @ params["value"]])

    alike = {"body": shape(4, 8), "policy": shape(8, 3), "value": shape(8, 3)}
    unlike = alike | {"value": shape(8, 1)}
    found = chosen(two_heads, alike, FEATURES, last=Sign(4.0))
    assert found["policy"] == found["value"] == Sign(4.0, layout="io")
    message = r"'policy' \(8, 3\), 'value' \(8, 1\);.*'\^policy\$': Sign"
    with pytest.raises(ValueError, match=message):
        infer_norms(two_heads, unlike, FEATURES, last=Sign())
    found = chosen(two_heads, unlike, FEATURES, last=Sign(), rules={"value": Sign(2.0)})
    assert (found["policy"], found["value"]) == (Sign(layout="io"), Sign(2.0, layout="io"))
    assert chosen(two_heads, unlike, FEATURES)["value"] == Spectral(layout="io")
    for function, params, rules in (
        (two_heads, alike, {"body|policy|value": Spectral()}),
        (lambda p, x: squares(x * p["gain"]), {"gain": shape(4)}, {}),
    ):
        with pytest.raises(ValueError, match="no output layer for last: write last=None"):
            infer_norms(function, params, FEATURES, last=Sign(), rules=rules)
    with pytest.raises(TypeError, match="last"):
        infer_norms(two_heads, alike, FEATURES)


REFUSED = [
    (ValueError, {"rules": {"ebmed": Sign()}},
        r"rules\['ebmed'\] finds no .*nearest is 'embed/embedding'"),
    (ValueError, {"rules": {"zzzzz": Sign()}}, r"rules\['zzzzz'\] finds no parameter$"),
    (ValueError, {"rules": {"head": Sign(), "^head": Sign()}},
        r"rules\['\^head'\] only finds parameters of rules before it, such as 'head/kernel'"),
    (ValueError, {"rules": {"(": Sign()}}, r"rules\['\('\]: not a regular expression"),
    (ValueError, {"rules": {"head": Sign(layout="ioo")}},
        r"'ioo' has 3 letters, but leaf 'head/kernel'"),
    *((ValueError, {name: Spectral(layout="io")}, f"^{name}=.*layouts are the program's")
        for name in ("last", "hidden", "first", "embeddings", "vectors")),
    ((TypeError, ValueError), {"has_aux": True}, "has_aux"),
    (TypeError, {"last": {"head": Sign()}}, "last is a Norm"),
    (TypeError, {"hidden": 50.0}, "hidden is a Norm"),
    (TypeError, {"vectors": None}, "vectors is a Norm"),
    (TypeError, {"rules": [("head", Sign())]}, "rules map patterns"),
    (TypeError, {"rules": {"head": 3.0}}, "'head': 3.0"),
    (TypeError, {"function": LANGUAGE}, "function is the loss or the forward pass"),
    (TypeError, {"params": {}}, "no floating array"),
    (TypeError, {"params": {"n": np.arange(3)}}, "no floating array"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "arguments", "message"), REFUSED)
def test_refused(error, arguments, message):
    arguments = {"function": language, "params": LANGUAGE, "last": None, **arguments}
    with pytest.raises(error, match=message):
        infer_norms(arguments.pop("function"), arguments.pop("params"), TOKENS, **arguments)


def autoencoder(params, x):
    return squares(x @ params["a"] @ params["a"].T - x) + squares(x @ params["b"])


def decomposed(params, x):
    return squares(x @ jnp.linalg.qr(params["a"])[0]) + squares(x @ params["b"])


def raveled(params, x):
    weights = params["a"].reshape(-1)
    return squares(x @ weights[:12].reshape(4, 3) + weights[12:15]) + squares(x @ params["b"])


def measured(params, x):
    return squares(x) * jnp.sum(params["a"] ** 2) + squares(x @ params["b"])


@pytest.mark.parametrize("loss", [autoencoder, decomposed, raveled, measured])
def test_what_cannot_be_read_is_named_with_its_place_and_remedy(loss):
    start = inspect.getsourcelines(loss)[1]
    sizes, layout = ((32,), "o[32]") if loss is raveled else ((4, 8), "io")
    params = {"params": {"a": shape(*sizes), "b": shape(4, 2)}}

    def wrapped(params, x):
        return loss(params["params"], x)

    with pytest.raises(ValueError, match="the program does not tell") as error:
        infer_norms(wrapped, params, FEATURES, last=None)
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"  'params/a' of shape {sizes}: ")
    assert any(f"test_infer_norms.py:{start + n}" in line for n in (1, 2))
    assert "rules={'^a$': Spectral(layout='…')}" in line
    with pytest.raises(ValueError, match="params/a"):  # a rule without a layout does not tell
        infer_norms(wrapped, params, FEATURES, last=None, rules={"^a$": Spectral()})
    found = chosen(wrapped, params, FEATURES, rules={"^a$": Spectral(layout=layout)})
    assert found["params/a"] == Spectral(layout=layout)


def test_all_that_cannot_be_read_are_named_at_once():
    params = {"a": shape(4, 8), "b": shape(4, 2), "c": shape(4, 6)}

    def loss(params, x):
        return autoencoder(params, x) + autoencoder(params | {"a": params["c"]}, x)

    with pytest.raises(ValueError, match="the program does not tell") as error:
        infer_norms(loss, params, FEATURES, last=None)
    assert [line.split()[0] for line in str(error.value).splitlines()[1:]] == ["'a'", "'c'"]
    x = jnp.ones((2, 4))  # which the function closes over, and is no data
    with pytest.raises(ValueError, match=r"'a' of shape.*(?s:.)*'b' of shape"):
        infer_norms(lambda params: two_layers(params, x), TWO, last=None)


def test_what_no_gradient_reaches_is_warned_of_where_it_is_read():
    params = TWO | {"idle": shape(3, 4), "stopped": shape(4, 8)}

    def stopping(params, x):
        return two_layers(params, x) + squares(x @ jax.lax.stop_gradient(params["stopped"]))

    with pytest.warns(UserWarning, match="no gradient reaches 'idle', 'stopped': ") as warned:
        assignment = infer_norms(stopping, params, FEATURES, last=None)
    assert warned[0].filename == __file__
    entries = {entry.path: entry for entry in assignment.entries}
    assert entries["idle"].is_unused
    assert entries["idle"].norm == BiasRMS(layout="oo")
    rules = {"idle|stopped": Spectral(layout="io")}
    found = chosen(stopping, params, FEATURES, rules=rules)  # no warning
    assert found["idle"] == Spectral(layout="io")


def on_devices(params, x):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(a, b, c, x):
        return squares(jax.lax.psum(jax.nn.relu(x @ a + b) @ c, "x"))

    names = [PartitionSpec(None, "x"), PartitionSpec("x"), PartitionSpec("x"), PartitionSpec()]
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=tuple(names), out_specs=PartitionSpec())
    return mapped(params["a"], params["b"], params["c"], x)


@jax.custom_vjp
def customized(params, x):
    return mlp(params, x)


customized.defvjp(lambda p, x: (mlp(p, x), (p, x)), lambda saved, g: (saved[0], saved[1]))
SAME = {
    "forward": lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"],
    "jit": jax.jit(mlp),
    "remat": jax.checkpoint(mlp),
    "vmap": lambda p, x: jnp.mean(jax.vmap(lambda row: mlp(p, row[None]))(x)),
    "scan": lambda p, x: jax.lax.scan(
        lambda total, part: (total + mlp(p, part), None), jnp.float32(0), x[:, None])[0],
    "fori_loop": lambda p, x: jax.lax.fori_loop(
        0, 2, lambda i, total: total + mlp(p, x[i, None]), 0.0),
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > 0, mlp, lambda p, x: mlp(p, x) * 2, p, x),
    "shard_map": on_devices,
    "custom_vjp": customized,
    "value_and_grad": lambda p, x: jax.value_and_grad(mlp)(p, x)[0],
    "gradient penalty": lambda p, x: mlp(p, x) + squares(jax.grad(mlp, argnums=1)(p, x)),
    "bfloat16": lambda p, x: mlp(*jax.tree.map(lambda w: w.astype(jnp.bfloat16), (p, x))),
    "float8": lambda p, x: mlp(p | {"a": p["a"].astype(jnp.float8_e4m3fn).astype(jnp.float32)}, x),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_how_a_program_is_written_makes_no_difference(name):
    assert read(SAME[name], MLP, FEATURES, last=Sign()) == EXPECTED


def test_outputs_beside_the_loss():
    """Metrics are no uses, and a parameter that only they depend on is unused."""

    def loss(params, x):
        return mlp(params, x), {"norm": jnp.linalg.norm(params["a"] @ params["m"])}

    params = MLP | {"m": shape(8, 2)}
    with pytest.warns(UserWarning, match="reaches 'm'"):
        table = read(loss, params, FEATURES, last=Sign(), has_aux=True)
    assert table == EXPECTED | {"m": "unused oo"}


def test_other_leaves_and_arguments_belong_to_the_program():
    params = MLP | {"order": jnp.arange(8), "activation": jax.nn.relu, "none": None}

    def loss(params, batch, name, train):
        assert (name, train) == ("x", True)
        x = params["activation"](batch["x"] @ params["a"] + params["b"])
        return squares(x[:, params["order"]] @ params["c"]) * batch["scale"]

    batch = {"x": FEATURES, "scale": 2.0}
    assert read(loss, params, batch, "x", True, last=Sign()) == EXPECTED


def test_it_is_a_value():
    one, two = (infer_norms(mlp, MLP, FEATURES, last=Sign()) for _ in range(2))
    assert one == two == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(two)
    assert one != infer_norms(mlp, MLP, FEATURES, last=None)
    concrete = jax.tree.map(lambda s: jnp.ones(s.shape), (MLP, FEATURES))
    assert infer_norms(mlp, *concrete, last=Sign()) == one
    assert jax.tree.leaves(one.labels(concrete[0])) == ["first io", "vectors o", "last io"]


def test_nothing_is_computed():
    with jax.transfer_guard("disallow"):
        infer_norms(two_layers, TWO, FEATURES, last=Sign())
    params, x = {"a": np.ones((4, 8)), "b": np.ones((8, 3))}, np.ones((2, 4))
    jax.eval_shape(lambda x: infer_norms(two_layers, params, x, last=Sign()) and x, x)
    with jax.enable_x64(True):
        assert chosen(two_layers, params, x)["b"] == Spectral(layout="io")
