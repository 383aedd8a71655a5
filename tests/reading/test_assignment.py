"""Assignments: norms and labels as one value, in every tree of the parameters."""

import pickle

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen, nnx

import scion_jax
from scion_jax import (
    Assignment,
    Auto,
    BiasRMS,
    ColNorm,
    Sign,
    Spectral,
    describe,
    init_params,
    label_by_path,
    scale_by_lmo,
    scion,
)
from scion_jax._assignment import Entry
from scion_jax._paths import leaf_path

pytestmark = [pytest.mark.fast, pytest.mark.unoptimized]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.value = nnx.Linear(4, 4, use_bias=False, rngs=rngs)  # as attention's
        self.own = nnx.Param({"a": jnp.ones(3), "value": jnp.ones(2)})
        self.head = nnx.Linear(4, 5, use_bias=False, rngs=rngs)


NORMS = {
    "embedding io": ColNorm(layout="io"),
    "hidden io": Spectral(2.0, layout="io"),
    "last io": Sign(16.0, layout="io"),
    "vectors o": BiasRMS(layout="o"),
    "unused o": BiasRMS(layout="o"),
}
KINDS = {
    "embed/embedding": ((5, 4), "embedding io"),
    "head/kernel": ((4, 5), "last io"),
    "layers/0/bias": ((4,), "vectors o"),
    "layers/0/kernel": ((4, 4), "hidden io"),
    "layers/1/bias": ((4,), "vectors o"),
    "layers/1/kernel": ((4, 4), "hidden io"),
    "own/a": ((3,), "vectors o"),
    "own/value": ((2,), "unused o"),
    "value/kernel": ((4, 4), "hidden io"),
}


def assignment(kinds=KINDS, prefix=""):
    return Assignment(
        tuple(
            Entry(prefix + path, shape, label, NORMS[label], (f"dot_general model.py:{len(path)}",))
            for path, (shape, label) in kinds.items()
        )
    )


def of_one(path, shape, norm):
    return Assignment((Entry(path, shape, "a", norm),))


def paths_of(tree):
    return [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def pure():
    return nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(0)), nnx.Param))


TREES = {
    "state": lambda: nnx.state(Model(nnx.Rngs(0)), nnx.Param),
    "module": lambda: Model(nnx.Rngs(0)),
    "shapes": lambda: nnx.eval_shape(lambda: Model(nnx.Rngs(0))),
    "arrays": pure,
    "variables": lambda: {"params": pure()},
    "frozen": lambda: flax.core.freeze({"params": pure()}),
    "boxed": lambda: jax.tree.map(lambda x: linen.Partitioned(x, (None,) * x.ndim), pure()),
}


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_every_tree_of_the_parameters_is_labelled(make):
    tree = make()
    expected = {path: label for path, (_, label) in KINDS.items()}
    for prefix in ("", "params/"):
        read = assignment(prefix=prefix)
        labels = read.labels(tree)
        assert jax.tree.structure(labels) == jax.tree.structure(tree)
        found = dict(zip(paths_of(tree), jax.tree.leaves(labels), strict=True))
        assert {path.removeprefix("params/"): label for path, label in found.items()} == expected
        shapes = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, tree))
        assert jax.tree.leaves(read.labels(shapes)) == jax.tree.leaves(labels)
    rules = label_by_path([(rf"^{path}$", label) for path, label in expected.items()])
    assert jax.tree.leaves(rules(tree)) == jax.tree.leaves(labels)


def test_parts_of_a_tree():
    tree = pure()
    layers = {0: optax.MaskedNode(), 1: tree["layers"][1]}
    part = {"head": tree["head"], "layers": layers, "x": None}
    labels = assignment().labels(part)
    assert jax.tree.structure(labels) == jax.tree.structure(part)
    assert jax.tree.leaves(labels) == ["last io", "vectors o", "hidden io"]
    optimizer = scion(0.1, assignment())  # no warning of norms that a part does not use
    jax.eval_shape(optimizer.update, part, optimizer.init(part), part)


def test_it_is_a_value():
    one, two = assignment(), assignment()
    assert one == two
    assert hash(one) == hash(two)
    assert one.labels == two.labels
    assert hash(one.labels) == hash(two.labels)
    assert one != assignment(dict(list(KINDS.items())[1:]))
    one.labels(pure())  # what it keeps for itself is nothing that changes it
    for value in (one, one.labels):
        again = pickle.loads(pickle.dumps(value))
        assert again == value
        assert hash(again) == hash(value)
    assert one.norms == NORMS
    assert jax.jit(lambda x, a: x + len(a.norms), static_argnums=1)(1, one) == 1 + len(NORMS)
    assert jax.tree.leaves([one]) == [one]


OPTIMIZERS = [
    scion,
    scion_jax.unconstrained_scion,
    scion_jax.scion_light,
    scion_jax.almond,
    lambda *args: scion_jax.clipped_scion(*args, rho=1.0),
    lambda *args: scion_jax.unconstrained_clipped_scion(*args, rho=1.0),
]
KEY = jax.random.key(0)
FUNCTIONS = [
    lambda params, *args: init_params(KEY, params, *args),
    scion_jax.gauges,
    scion_jax.gauge_bounds,
    scion_jax.dual_norm,
    lambda params, *args: scion_jax.frank_wolfe_gap(params, params, *args),
]


def first_step(optimizer, params):
    return optimizer.update(params, optimizer.init(params), params)[0]


def test_everything_takes_it_alone():
    params, read = pure(), assignment()
    ways = (read,), (read.norms, read.labels)
    steps = [lambda p, *norms, b=b: first_step(b(0.1, *norms), p) for b in OPTIMIZERS]
    for function in (*FUNCTIONS, *steps):
        one, other = (jax.make_jaxpr(lambda p, f=function, a=a: f(p, *a))(params) for a in ways)
        assert str(one) == str(other)
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="an Assignment, which has its own"):
            function(params, read, read.labels)
    for build in OPTIMIZERS:
        with pytest.raises(ValueError, match="an Assignment, which has its own"):
            build(0.1, read, label_by_path([("", "x")]))


def test_multi_transform_routes_by_it():
    params, read = pure(), assignment()
    routed = optax.multi_transform({k: scale_by_lmo(n) for k, n in read.norms.items()}, read.labels)
    together = scion_jax.unconstrained_scion(1.0, read, momentum=1.0)
    steps = [jax.jit(lambda p, o=o: first_step(o, p))(params) for o in (routed, together)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, atol=1e-5), *steps)


@pytest.mark.parametrize("static", [["norms"], [], ["norms", "param_labels"]])
def test_under_inject_hyperparams(static):
    params, read = pure(), assignment()
    optimizer = optax.inject_hyperparams(scion, static_args=static)(0.1, read)
    updates, state = jax.eval_shape(optimizer.update, params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert state.hyperparams.keys() == {"learning_rate", "momentum", "optimism"}


def test_a_schedule_in_place_of_labels_is_explained():
    read = assignment()
    for labels in (read.labels, label_by_path([("", "hidden io")])):
        optimizer = optax.inject_hyperparams(scion)(0.1, read.norms, labels)
        with pytest.raises(TypeError, match=r"a count.*inject_hyperparams.*static_args"):
            optimizer.init(pure())


def test_nnx_optimizers_take_it():
    model, read = Model(nnx.Rngs(0)), assignment()
    nnx.update(model, init_params(jax.random.key(0), nnx.state(model, nnx.Param), read))
    assert float(Sign(16.0).gauge(model.head.kernel[...])) == pytest.approx(1)
    for wrt in (nnx.Param, nnx.All(nnx.Param, nnx.PathContains("head"))):
        optimizer = nnx.Optimizer(model, scion(0.1, read), wrt=wrt)
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, wrt)))


def test_in_shard_map_devices_see_their_parts():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer = scion_jax.unconstrained_scion(1.0, of_one("w", (16, 4), Sign(layout="io")))
    spec = jax.sharding.PartitionSpec("x")
    mapped = jax.shard_map(
        lambda params: first_step(optimizer, params), mesh=mesh, in_specs=spec, out_specs=spec
    )
    assert jax.jit(mapped)({"w": jnp.ones((16, 4))})["w"].shape == (16, 4)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"head": {"kernle": np.ones((4, 5))}}, r"'head/kernle' is no parameter.*'head/kernel'\)"),
        ({"zzzz": np.ones(3)}, r"leaf 'zzzz' is no parameter of the program that [^(]*;"),
        ({"head": {"kernel": np.ones((5, 4))}}, r"has shape \(5, 4\), but \(4, 5\) in the program"),
        ({"params": {}, "batch_stats": {"x": np.ones(2)}}, r"'batch_stats'.*variables\['params'\]"),
        ({"batch_stats": {"x": np.ones(2)}}, "'batch_stats/x' is no parameter"),
    ],
)
def test_other_trees_are_refused(tree, message):
    read = assignment()
    for function in (read.labels, read.muon_dimension_numbers, scion(0.1, read).init):
        with pytest.raises(ValueError, match=message):
            function(tree)


def test_other_leaves_are_refused_in_their_own_words():
    with pytest.raises(TypeError, match=r"leaf 'activation' .*eqx\.filter"):
        scion(0.1, assignment()).init({"activation": jax.nn.relu})


def test_entries_that_contradict_each_other():
    entry = Entry("a", (2, 2), "x", Spectral())
    with pytest.raises(ValueError, match="several entries have the path 'a'"):
        Assignment((entry, entry))
    with pytest.raises(ValueError, match=r"label 'x' stands for .*Sign.* and for .*Spectral"):
        Assignment((entry, Entry("c", (2, 2), "x", Sign())))


def test_description():
    table = describe(pure(), assignment())
    assert [row.path for row in table.rows] == list(KINDS)
    assert table.rows[1].read_at == "dot_general model.py:11"
    assert table.unused == ("own/value: no gradient reaches it",)
    lines = str(table).splitlines()
    assert lines[0].endswith("read at")
    assert [line.split()[0] for line in lines[2:-1]] == [
        *("embed/embedding", "head/kernel", "layers/0…1/bias", "layers/0…1/kernel"),
        *("own/a", "own/value", "value/kernel"),
    ]
    assert lines[-1] == "own/value: no gradient reaches it"
    unused = assignment({f"blocks/{i}/b": ((4,), "unused o") for i in range(3)})
    tree = {"blocks": [{"b": jnp.ones(4)}] * 3}
    assert describe(tree, unused).unused == ("blocks/0…2/b: no gradient reaches it",)
    assert len(describe(tree, unused, fold=False).unused) == 3
    later = Entry("u", (4,), "unusedly named", BiasRMS())
    assert describe({"u": jnp.ones(4)}, Assignment((later,))).unused == ()


# MaxText: kernels are (embed, heads, head_dim), scanned layers are on axis 1.
NUMBERS = optax.contrib.MuonDimensionNumbers
MAXTEXT = {
    "embedder/embedding": ((11, 8), "embedding io", None),
    "decoder/query": ((8, 2, 4), "hidden ioo", NUMBERS((0,), (1, 2))),
    "decoder/out": ((2, 4, 8), "hidden iio", NUMBERS((0, 1), (2,))),
    "decoder/wi": ((8, 16), "hidden io", NUMBERS((0,), (1,))),
    "layers/query": ((8, 3, 2, 4), "hidden iboo", NUMBERS((0,), (2, 3))),
    "layers/out": ((2, 3, 4, 8), "hidden ibio", NUMBERS((0, 2), (3,))),
    "layers/wi": ((8, 3, 16), "hidden ibo", NUMBERS((0,), (2,))),
    "layers/wqkv": ((8, 3, 12), "hidden ibo[3]", NUMBERS((0,), (2,))),
    "layers/conv": ((5, 4, 6), "hidden sio", NUMBERS((0, 1), (2,))),
    "layers/scale": ((8, 3), "vectors ob", None),
    "decoder/norm": ((8,), "vectors o", None),
    "head": ((8, 11), "last io", None),
    "idle": ((8, 8), "unused io", None),
}


def test_muon_dimension_numbers():
    kinds = {"embedding": ColNorm, "hidden": Spectral, "vectors": BiasRMS, "last": Sign}
    entries, flat = [], {}
    for path, (sizes, label, _) in MAXTEXT.items():
        word, layout = label.split()
        entries.append(Entry(path, sizes, label, kinds.get(word, Spectral)(layout=layout)))
        flat[path] = jnp.asarray(np.random.default_rng(0).normal(size=sizes), jnp.float32)
    read = Assignment(tuple(entries))
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    by_hand = {path: numbers for path, (_, _, numbers) in MAXTEXT.items()}
    by_hand = flax.traverse_util.unflatten_dict(by_hand, sep="/")
    assert read.muon_dimension_numbers(params) == by_hand
    wrapped = read.muon_dimension_numbers({"params": params})
    assert jax.tree.leaves(wrapped) == jax.tree.leaves(by_hand)
    auto = Assignment((Entry("w", (2, 3), "a", Auto()), Entry("c", (3,), "a", Auto())))
    numbers = auto.muon_dimension_numbers({"w": jnp.ones((2, 3)), "c": jnp.ones(3)})
    assert numbers == {"w": NUMBERS((0,), (1,)), "c": None}
    for tree, numbers in (
        (params, read.muon_dimension_numbers),
        (TREES["state"](), assignment().muon_dimension_numbers),
    ):
        muon = optax.contrib.muon(jnp.float32(0.1), muon_weight_dimension_numbers=numbers)
        with jax.numpy_dtype_promotion("standard"):  # Optax's Muon needs it
            updates = jax.eval_shape(lambda tree, m=muon: first_step(m, tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)


def test_a_layer_that_is_called_value():
    class Attention(eqx.Module):
        query: eqx.nn.Linear
        value: eqx.nn.Linear

    tree = {"a": Attention(*(eqx.nn.Linear(2, 3, key=jax.random.key(i)) for i in range(2)))}
    assert paths_of(tree) == ["a/query/weight", "a/query/bias", "a/value/weight", "a/value/bias"]


def test_stacked_gains_of_a_module_are_refused():
    class Stack(nnx.Module):
        def __init__(self):
            self.norms = nnx.Module()
            self.norms.scale = nnx.Param(jnp.ones((3, 8)))

    for tree in (Stack(), nnx.state(Stack()), {"norms": {"scale": jnp.ones((3, 8))}}):
        with pytest.raises(ValueError, match=r"'norms/scale' of shape \(3, 8\)"):
            scion(0.1).init(tree)
