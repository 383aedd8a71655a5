"""Which norm a parameter gets, what is refused and in which words, and what makes no difference."""

import inspect
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from leaves import cross_entropy, read, shape, squares

import scion_jax
from scion_jax import BiasRMS, ColNorm, Euclidean, RowNorm, Sign, Spectral, infer_norms

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]

TOKENS, FEATURES = shape(2, 5, dtype=jnp.int32), shape(2, 4)
LANGUAGE = {
    "embed": {"embedding": shape(12, 8)},
    "gain": shape(8),
    "hidden": {"bias": shape(8), "kernel": shape(8, 8)},
    "head": {"bias": shape(12), "kernel": shape(8, 12)},
}


def language(params, tokens):
    x = params["embed"]["embedding"][tokens] * params["gain"]
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return cross_entropy(logits[:, :-1], tokens[:, 1:])


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


def two_layers(params, x):
    return squares(jax.nn.relu(x @ params["a"]) @ params["b"])


TWO = {"a": shape(4, 8), "b": shape(8, 3)}


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
    hidden = options.get("hidden", Spectral())
    assert type(found["b"]) is type(hidden)
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


def test_labels_are_not_mixed_up_by_patterns_that_look_like_them():
    rules = {"hidden": Spectral(5.0), "embed": ColNorm(2.0)}
    options = {"hidden": Spectral(3.0), "rules": rules, "last": Sign()}
    found = chosen(language, LANGUAGE, TOKENS, **options)
    assert found["hidden/kernel"] == Spectral(5.0, layout="io")
    assert found["embed/embedding"] == ColNorm(2.0, layout="io")


def two_heads(params, x):
    x = jax.nn.relu(x @ params["body"])
    return squares([x @ params["policy"], x @ params["value"]])


def heads(*widths):
    policy, value = widths
    return {"body": shape(4, 8), "policy": shape(8, policy), "value": shape(8, value)}


def test_last():
    found = chosen(two_heads, heads(3, 3), FEATURES, last=Sign(4.0))
    assert found["policy"] == found["value"] == Sign(4.0, layout="io")
    with pytest.raises(
        ValueError, match=r"'policy' \(8, 3\), 'value' \(8, 1\);.*'\^policy\$': Sign"
    ):
        infer_norms(two_heads, heads(3, 1), FEATURES, last=Sign())
    rules = {"value": Sign(2.0)}
    found = chosen(two_heads, heads(3, 1), FEATURES, last=Sign(), rules=rules)
    assert (found["policy"], found["value"]) == (Sign(layout="io"), Sign(2.0, layout="io"))
    assert chosen(two_heads, heads(3, 1), FEATURES)["value"] == Spectral(layout="io")
    for rules in ({}, {"body|policy|value": Spectral()}):
        function = two_heads if rules else lambda p, x: squares(x * p["body"])
        params = heads(3, 3) if rules else {"body": shape(4)}
        with pytest.raises(ValueError, match="no output layer for last: write last=None"):
            infer_norms(function, params, FEATURES, last=Sign(), rules=rules)
    with pytest.raises(TypeError, match="last"):
        infer_norms(two_heads, heads(3, 3), FEATURES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": {"ebmed": Sign()}}, r"rules\['ebmed'\] finds no .*nearest is 'embed/embedding'"),
        ({"rules": {"zzzzz": Sign()}}, r"rules\['zzzzz'\] finds no parameter$"),
        (
            {"rules": {"head": Sign(), "^head": Sign()}},
            r"rules\['\^head'\] only finds parameters of rules before it, such as 'head/kernel'",
        ),
        ({"rules": {"(": Sign()}}, r"rules\['\('\]: not a regular expression"),
        ({"rules": {"head": Sign(layout="ioo")}}, r"'ioo' has 3 letters, but leaf 'head/kernel'"),
        *(
            ({name: Spectral(layout="io")}, f"^{name}=.*layouts are the program's")
            for name in ("last", "hidden", "first", "embeddings", "vectors")
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        infer_norms(language, LANGUAGE, TOKENS, **{"last": None, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last": {"head": Sign()}}, "last is a Norm"),
        ({"hidden": 50.0}, "hidden is a Norm"),
        ({"vectors": None}, "vectors is a Norm"),
        ({"rules": [("head", Sign())]}, "rules map patterns"),
        ({"rules": {"head": 3.0}}, "'head': 3.0"),
        ({"function": LANGUAGE}, "function is the loss or the forward pass"),
        ({"params": {}}, "no floating array"),
        ({"params": {"n": jnp.arange(3)}}, "no floating array"),
    ],
)
def test_types(arguments, message):
    function, params = arguments.pop("function", language), arguments.pop("params", LANGUAGE)
    with pytest.raises(TypeError, match=message):
        infer_norms(function, params, TOKENS, **{"last": None, **arguments})


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
    sizes = (32,) if loss is raveled else (4, 8)
    params = {"params": {"a": shape(*sizes), "b": shape(4, 2)}}

    def wrapped(params, x):
        return loss(params["params"], x)

    with pytest.raises(ValueError, match="the program does not tell") as error:
        infer_norms(wrapped, params, FEATURES, last=None)
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"  'params/a' of shape {sizes}: ")
    places = [f"test_infer_norms.py:{line}" for line in range(start + 1, start + 3)]
    assert any(place in line for place in places)
    assert "rules={'^a$': Spectral(layout='…')}" in line
    with pytest.raises(ValueError, match="params/a"):  # a rule without a layout does not tell
        infer_norms(wrapped, params, FEATURES, last=None, rules={"^a$": Spectral()})
    layout = "o[32]" if loss is raveled else "io"
    found = chosen(wrapped, params, FEATURES, rules={"^a$": Spectral(layout=layout)})
    assert found["params/a"] == Spectral(layout=layout)


def test_all_that_cannot_be_read_are_named_at_once():
    params = {"a": shape(4, 8), "b": shape(4, 2), "c": shape(4, 6)}

    def loss(params, x):
        return autoencoder(params, x) + autoencoder(params | {"a": params["c"]}, x)

    with pytest.raises(ValueError, match="the program does not tell") as error:
        infer_norms(loss, params, FEATURES, last=None)
    assert [line.split()[0] for line in str(error.value).splitlines()[1:]] == ["'a'", "'c'"]


def test_a_function_that_returns_no_pair_has_no_aux():
    with pytest.raises((TypeError, ValueError), match="has_aux"):
        infer_norms(language, LANGUAGE, TOKENS, last=None, has_aux=True)


def test_inputs_that_the_function_closes_over_are_no_data():
    x = jnp.ones((2, 4))
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


MLP = {"a": shape(4, 8), "b": shape(8), "c": shape(8, 3)}
EXPECTED = {"a": "io", "b": "o", "c": "last io"}


def mlp(params, x):
    return squares(jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"])


def in_microbatches(params, x):
    def step(total, part):
        return total + mlp(params, part), None

    return jax.lax.scan(step, jnp.float32(0), x.reshape(2, 1, 4))[0]


def in_a_loop(params, x):
    return jax.lax.fori_loop(0, 2, lambda i, total: total + mlp(params, x[i, None]), 0.0)


def on_devices(params, x):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(a, b, c, x):
        y = jax.lax.psum(jax.nn.relu(x @ a + b) @ c, "x")
        return squares(y)

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
    "scan": in_microbatches,
    "fori_loop": in_a_loop,
    "cond": lambda p, x: jax.lax.cond(x[0, 0] > 0, mlp, lambda p, x: mlp(p, x) * 2, p, x),
    "shard_map": on_devices,
    "custom_vjp": customized,
    "value_and_grad": lambda p, x: jax.value_and_grad(mlp)(p, x)[0],
    "gradient penalty": lambda p, x: mlp(p, x) + squares(jax.grad(mlp, argnums=1)(p, x)),
    "bfloat16": lambda p, x: mlp(
        jax.tree.map(lambda w: w.astype(jnp.bfloat16), (p)), x.astype(jnp.bfloat16)
    ),
    "float8": lambda p, x: mlp(p | {"a": p["a"].astype(jnp.float8_e4m3fn).astype(jnp.float32)}, x),
}


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


def test_no_framework_is_imported():
    code = "import sys, jax.numpy as jnp, scion_jax\n"
    code += "scion_jax.infer_norms(lambda p, x: (x @ p).sum(), jnp.ones((3, 2)), jnp.ones((1, 3)),"
    code += " last=None)\nassert not {'flax', 'equinox', 'haiku', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert scion_jax.infer_norms is infer_norms
