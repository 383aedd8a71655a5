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
from scion_jax.labels import leaf_path

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


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_every_tree_of_the_parameters_is_labelled(make, prefix):
    tree = make()
    read = assignment(prefix=prefix)
    labels = read.labels(tree)
    assert jax.tree.structure(labels) == jax.tree.structure(tree)
    paths = [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    found = dict(zip(paths, jax.tree.leaves(labels), strict=True))
    expected = {path: label for path, (_, label) in KINDS.items()}
    assert {path.removeprefix("params/"): label for path, label in found.items()} == expected
    rules = label_by_path([(rf"^{path}$", label) for path, label in expected.items()])
    assert jax.tree.leaves(rules(tree)) == jax.tree.leaves(labels)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.zeros_like, tree))
    assert jax.tree.leaves(read.labels(shapes)) == jax.tree.leaves(labels)


def test_parts_of_a_tree():
    tree = pure()
    part = {
        "head": tree["head"],
        "layers": {0: optax.MaskedNode(), 1: tree["layers"][1]},
        "x": None,
    }
    labels = assignment().labels(part)
    assert jax.tree.structure(labels) == jax.tree.structure(part)
    assert jax.tree.leaves(labels) == ["last io", "vectors o", "hidden io"]
    optimizer = scion(0.1, assignment())  # no warning of norms that a part does not use
    optimizer.update(part, optimizer.init(part), part)


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


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_optimizers_take_it_alone(build):
    params, read = pure(), assignment()
    steps = []
    for norms in ([read], [read.norms, read.labels]):
        optimizer = build(0.1, *norms)
        steps.append(optimizer.update(params, optimizer.init(params), params)[0])
    jax.tree.map(np.testing.assert_array_equal, *steps)


def test_everything_takes_it_alone():
    params, read = pure(), assignment()
    pair = read.norms, read.labels
    key = jax.random.key(0)
    for function in (
        lambda *args: init_params(key, params, *args),
        lambda *args: scion_jax.gauges(params, *args),
        lambda *args: scion_jax.gauge_bounds(params, *args),
        lambda *args: scion_jax.dual_norm(params, *args),
        lambda *args: scion_jax.frank_wolfe_gap(params, params, *args),
    ):
        jax.tree.map(np.testing.assert_array_equal, function(read), function(*pair))
        with pytest.raises(ValueError, match="an Assignment, which has labels of its own"):
            function(read, read.labels)
    for build in OPTIMIZERS:
        with pytest.raises(ValueError, match="leave param_labels out"):
            build(0.1, read, label_by_path([("", "x")]))


def test_multi_transform_routes_by_it():
    params, read = pure(), assignment()
    routed = optax.multi_transform({k: scale_by_lmo(n) for k, n in read.norms.items()}, read.labels)
    together = scion_jax.unconstrained_scion(1.0, read, momentum=1.0)
    steps = [o.update(params, o.init(params), params)[0] for o in (routed, together)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, atol=1e-5), *steps)


@pytest.mark.parametrize("static", [["norms"], [], ["norms", "param_labels"]])
def test_under_inject_hyperparams(static):
    params, read = pure(), assignment()
    build = optax.inject_hyperparams(scion, static_args=static)
    optimizer = build(0.1, read)
    updates, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert state.hyperparams.keys() == {"learning_rate", "momentum"}


def test_a_schedule_in_place_of_labels_is_explained():
    params, read = pure(), assignment()
    for labels in (read.labels, label_by_path([("", "hidden io")])):
        optimizer = optax.inject_hyperparams(scion)(0.1, read.norms, labels)
        with pytest.raises(TypeError, match=r"a count.*inject_hyperparams.*static_args"):
            optimizer.init(params)


def test_nnx_optimizers_take_it():
    model, read = Model(nnx.Rngs(0)), assignment()
    nnx.update(model, init_params(jax.random.key(0), nnx.state(model, nnx.Param), read))
    assert float(Sign(16.0).gauge(model.head.kernel[...])) == pytest.approx(1)
    for wrt in (nnx.Param, nnx.All(nnx.Param, nnx.PathContains("head"))):
        optimizer = nnx.Optimizer(model, scion(0.1, read), wrt=wrt)
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, wrt)))


def test_in_shard_map_devices_see_their_parts():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    read = Assignment((Entry("w", (16, 4), "a", Sign(layout="io")),))
    optimizer = scion_jax.unconstrained_scion(1.0, read, momentum=1.0)
    spec = jax.sharding.PartitionSpec("x")

    def step(params):
        return optimizer.update(params, optimizer.init(params), params)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    assert jax.jit(mapped)({"w": jnp.ones((16, 4))})["w"].shape == (16, 4)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"head": {"kernle": jnp.ones((4, 5))}}, r"'head/kernle' is no parameter.*'head/kernel'\)"),
        ({"zzzz": jnp.ones(3)}, r"leaf 'zzzz' is no parameter of the program that [^(]*;"),
        (
            {"head": {"kernel": jnp.ones((5, 4))}},
            r"has shape \(5, 4\), but \(4, 5\) in the program",
        ),
        (
            {"params": {}, "batch_stats": {"x": jnp.ones(2)}},
            r"'batch_stats'.*variables\['params'\]",
        ),
        ({"batch_stats": {"x": jnp.ones(2)}}, "'batch_stats/x' is no parameter"),
    ],
)
def test_other_trees_are_refused(tree, message):
    for function in (assignment().labels, assignment().muon_dimension_numbers):
        with pytest.raises(ValueError, match=message):
            function(tree)
    with pytest.raises(ValueError, match=message):
        scion(0.1, assignment()).init(tree)


def test_other_leaves_are_refused_in_their_own_words():
    with pytest.raises(TypeError, match=r"leaf 'activation' is .*eqx\.filter"):
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
    "embedder/embedding": ((11, 8), "io", None),
    "decoder/query": ((8, 2, 4), "ioo", NUMBERS((0,), (1, 2))),
    "decoder/out": ((2, 4, 8), "iio", NUMBERS((0, 1), (2,))),
    "decoder/wi": ((8, 16), "io", NUMBERS((0,), (1,))),
    "layers/query": ((8, 3, 2, 4), "iboo", NUMBERS((0,), (2, 3))),
    "layers/out": ((2, 3, 4, 8), "ibio", NUMBERS((0, 2), (3,))),
    "layers/wi": ((8, 3, 16), "ibo", NUMBERS((0,), (2,))),
    "layers/wqkv": ((8, 3, 12), "ibo[3]", NUMBERS((0,), (2,))),
    "layers/conv": ((5, 4, 6), "sio", NUMBERS((0, 1), (2,))),
    "layers/scale": ((8, 3), "ob", None),
    "decoder/norm": ((8,), "o", None),
    "head": ((8, 11), "io", None),
    "idle": ((8, 8), "io", None),
}


def of_maxtext(path, layout):
    if path == "embedder/embedding":
        return "embedding", ColNorm(layout=layout)
    if path == "head":
        return "last", Sign(layout=layout)
    if path == "idle":
        return "unused", Spectral(layout=layout)
    if set(layout) <= set("ob"):
        return f"vectors {layout}", BiasRMS(layout=layout)
    return f"hidden {layout}", Spectral(layout=layout)


def test_muon_dimension_numbers():
    entries = [Entry(p, s, *of_maxtext(p, layout)) for p, (s, layout, _) in MAXTEXT.items()]
    read = Assignment(tuple(entries))
    rng = np.random.default_rng(0)
    flat = {
        path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, (s, _, _) in MAXTEXT.items()
    }
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    by_hand = {path: numbers for path, (_, _, numbers) in MAXTEXT.items()}
    by_hand = flax.traverse_util.unflatten_dict(by_hand, sep="/")
    assert read.muon_dimension_numbers(params) == by_hand
    assert jax.tree.leaves(read.muon_dimension_numbers({"params": params})) == jax.tree.leaves(
        by_hand
    )
    steps = []
    for numbers in (read.muon_dimension_numbers, by_hand):
        muon = optax.contrib.muon(
            jnp.float32(0.1), muon_weight_dimension_numbers=numbers, weight_decay=0.1
        )
        with jax.numpy_dtype_promotion("standard"):  # Optax's Muon needs it
            steps.append(muon.update(params, muon.init(params), params)[0])
    jax.tree.map(np.testing.assert_array_equal, *steps)


def test_muon_takes_states_of_nnx():
    state, read = TREES["state"](), assignment()
    muon = optax.contrib.muon(0.1, muon_weight_dimension_numbers=read.muon_dimension_numbers)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = muon.update(state, muon.init(state), state)
    assert jax.tree.structure(updates) == jax.tree.structure(state)
    auto = Assignment((Entry("w", (2, 3), "a", Auto()), Entry("c", (3,), "a", Auto())))
    numbers = auto.muon_dimension_numbers({"w": jnp.ones((2, 3)), "c": jnp.ones(3)})
    assert numbers == {"w": NUMBERS((0,), (1,)), "c": None}


def test_a_layer_that_is_called_value():
    class Attention(eqx.Module):
        query: eqx.nn.Linear
        value: eqx.nn.Linear

    one, two = (eqx.nn.Linear(2, 3, key=jax.random.key(i)) for i in range(2))
    tree = {"a": Attention(one, two)}
    paths = [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["a/query/weight", "a/query/bias", "a/value/weight", "a/value/bias"]


def test_stacked_gains_of_a_module_are_refused():
    class Stack(nnx.Module):
        def __init__(self):
            self.norms = nnx.Module()
            self.norms.scale = nnx.Param(jnp.ones((3, 8)))

    for tree in (Stack(), nnx.state(Stack()), {"norms": {"scale": jnp.ones((3, 8))}}):
        with pytest.raises(ValueError, match=r"'norms/scale' of shape \(3, 8\)"):
            scion(0.1).init(tree)
