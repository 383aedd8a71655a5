"""Whatever comes in, it works, or is refused in our words, which name it.

What is drawn as good has to work, and what is drawn as bad has to be named: hyperparameters, norms,
layouts, labels, parameters, gradients. Keys, shapes and flags are left to JAX and Python.
"""

import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st

import scion_jax
from scion_jax import Auto, Sign, Spectral
from tests.support import arguments, inputs
from tests.support.arguments import BAD_LAYOUTS, NO_PARAMETERS, argument, one_of, shape
from tests.support.inputs import with_leaf
from tests.support.refusals import check_stable, outcome, random_cases, traced, types

pytestmark = pytest.mark.unoptimized

OPTIMIZERS = [
    *(scion_jax.scion, scion_jax.unconstrained_scion, scion_jax.clipped_scion),
    *(scion_jax.unconstrained_clipped_scion, scion_jax.scion_light, scion_jax.almond),
]
OTHER_LEAVES = {  # of gradients
    "same": lambda leaf: st.just(leaf),
    "other dtype": lambda leaf: arguments.FLOATS.map(lambda d: shape(*leaf.shape, dtype=d)),
    "other shape": lambda leaf: st.just(shape(*leaf.shape, 2)),
    "no gradient": lambda leaf: NO_PARAMETERS,
    "missing": lambda leaf: one_of(None, optax.MaskedNode(), {}, ()),
    "more": lambda leaf: st.just([leaf, leaf]),
}


@st.composite
def gradients(draw, params):
    """Gradients, and what is wrong with them for these parameters."""
    kind = draw(one_of("same", "containers", *OTHER_LEAVES))
    if not jax.tree.leaves(params):
        return params, ()
    if kind == "containers":
        grads = draw(one_of([params], {"a": params}, jax.tree.leaves(params)))
        same = jax.tree.structure(grads) == jax.tree.structure(params)
        return grads, () if same else ("the gradients",)
    grads, path = draw(with_leaf(params, OTHER_LEAVES[kind]))
    # A leaf in place of which there are two is named as what they are in.
    return grads, () if kind in ("same", "other dtype") else (path, path[:-1] + "/")


@random_cases(60, build=one_of(*OPTIMIZERS), case=inputs.cases(), data=st.data())
def test_optimizers(build, case, data):
    values = data.draw(arguments.arguments(build))
    grads, with_params, bad, certain = case.params, True, case.bad, case.certain
    fault = "" if bad else data.draw(one_of("", "gradients", "argument", "no params"))
    fault = "no params" if case.params is None else fault
    if fault == "gradients":
        grads, bad = data.draw(gradients(case.params))
    if fault == "argument":
        values, bad = data.draw(arguments.arguments(build, fault=True))
    if fault == "no params":
        with_params, bad, certain = False, ("params",), False

    def steps(params, grads):
        optimizer = build(norms=case.norms, param_labels=case.param_labels, **values)
        state = optimizer.init(params)
        updates, after = optimizer.update(grads, state, params if with_params else None)
        return state, after, updates

    result = outcome(lambda: traced(steps, case.params, grads), bad, certain)
    if result is not None:
        check_stable(*result[:2])
        assert types(result[2]) == types(case.params)


STAGES = [
    scion_jax.scale_by_lmo,
    lambda norm: scion_jax.clip_by_pairing(scion_jax.scale_by_lmo(norm), 0.0, per_leaf=True),
    lambda norm: scion_jax.clip_by_pairing(scion_jax.scale_by_lmo(norm), 1.0),
    lambda norm: scion_jax.decay_weights(0.1, norm),
    lambda norm: scion_jax.average_gradients(0.1, jnp.bfloat16),
]


@random_cases(20, build=one_of(*STAGES), case=inputs.cases(["single"]), data=st.data())
def test_stages(build, case, data):
    with_params = data.draw(st.booleans())
    needed = ("params",) * (build is STAGES[3] and not with_params)
    params, bad, certain = case.params, (*case.bad, "the gradients", *needed), False
    if case.bad and data.draw(st.booleans()):
        params, path = data.draw(with_leaf(params, lambda _: NO_PARAMETERS))
        bad, certain = (*case.bad, path, *needed), build is not STAGES[3]
    grads, more = data.draw(gradients(case.params))

    def steps(params, grads):
        stage = build(case.norms)
        state = stage.init(params)
        _, after = stage.update(grads, state, params if with_params else None)
        return state, after

    result = outcome(lambda: traced(steps, params, grads), (*bad, *more), certain)
    if result is not None:
        check_stable(*result)


@random_cases(20, case=inputs.cases(), data=st.data())
def test_diagnostics(case, data):
    name = data.draw(one_of("gauges", "dual_norm", "gauge_bounds", "frank_wolfe_gap", "describe"))
    trees, bad, more = (case.params,), case.bad, {}
    if name == "frank_wolfe_gap":
        grads, no_gradients = (case.params, ()) if bad else data.draw(gradients(case.params))
        trees, bad = (case.params, grads), (*bad, *no_gradients)
    if name == "gauge_bounds" and not bad:
        more["shard_over"], bad = data.draw(argument("shard_over"))

    def call(*trees):
        result = getattr(scion_jax, name)(*trees, case.norms, case.param_labels, **more)
        return None if name == "describe" and str(result) else result

    outcome(lambda: traced(call, *trees), bad, case.certain)


@random_cases(20, case=inputs.cases(), data=st.data())
def test_starting_points(case, data):
    bad, certain = case.bad, case.certain
    if not certain or not bad:  # how a vector starts is not known from its shape
        bad, certain = (*bad, *inputs.paths_of(case.params)), False

    def call(params=case.params):
        key = jax.random.key(0)
        return scion_jax.init_params(key, params, case.norms, case.param_labels)

    traces = data.draw(one_of(lambda: traced(call, case.params), lambda: jax.eval_shape(call)))
    result = outcome(traces, bad, certain)
    if result is not None:
        assert types(result) == types(case.params)


@random_cases(30, kind=one_of(*arguments.NORMS), sizes=arguments.SHAPES, data=st.data())
def test_norms(kind, sizes, data):
    layout, values = data.draw(arguments.layouts(sizes)), data.draw(arguments.arguments(kind))
    array = shape(*sizes, dtype=data.draw(arguments.FLOATS))
    fault = data.draw(one_of("", "argument", "layout", "array"))
    bad, certain = (), True
    if kind is scion_jax.SpectralConv and "s" not in layout:
        bad = ("no window",)
    if fault == "argument":
        values, name = data.draw(arguments.arguments(kind, fault=True))
        bad = (*bad, *name)
    if fault == "layout":
        layout = data.draw(BAD_LAYOUTS)
        bad, certain = (*bad, "layout"), kind is not Auto  # which ignores it for vectors
    if fault == "array":
        array = data.draw(NO_PARAMETERS | st.none())
        bad = (*bad, "array")

    def call(array):
        norm = kind(**values, layout=layout)
        start = norm.init(jax.random.key(0), sizes)
        return norm.lmo(array), start, norm.gauge(array), norm.dual_norm(array)

    result = outcome(lambda: traced(call, array), bad, certain)
    if result is not None:
        chex.assert_trees_all_equal_shapes_and_dtypes(result[:2], (array, shape(*sizes)))


FUNCTIONS = [
    *(scion_jax.scaled_relu, scion_jax.scaled_gelu, scion_jax.scaled_relu_squared),
    *(scion_jax.orthogonalize, scion_jax.NewtonSchulz, scion_jax.label_by_path),
    *(scion_jax.average_gradients, scion_jax.clip_by_pairing),
]
IN_MESSAGES = {"rules": "rule"}


@random_cases(25, function=one_of(*FUNCTIONS), fault=st.booleans(), data=st.data())
def test_functions(function, fault, data):
    values = data.draw(arguments.arguments(function, fault))
    values, bad = values if fault else (values, ())
    bad = tuple(IN_MESSAGES.get(name, name) for name in bad)

    def call(values):
        result = function(**values)
        return result if isinstance(result, jax.Array) else None

    # Of a schedule some faults show when it is called a second time.
    outcome(
        lambda: traced(call, values), bad, certain={"rho", "momentum", "optimism"}.isdisjoint(bad)
    )


@random_cases(5, case=inputs.cases(["single"]), others=inputs.TREES, data=st.data())
def test_pairings(case, others, data):
    """Of a state that keeps them, of one that does not, and of something else."""
    per_leaf = data.draw(st.booleans())
    params = data.draw(one_of(case.params, others))
    other = data.draw(one_of(..., None, 3, "state", {"pairings": jnp.ones(2)}, params))

    def call(params):
        optimizer = scion_jax.clipped_scion(0.1, case.norms, rho=0.0, per_leaf=per_leaf)
        state = optimizer.init(case.params) if other is ... else other
        return scion_jax.pairings(state, params)

    outcome(lambda: traced(call, params), (*inputs.paths_of(case.params), "state"), certain=False)


def loss(params, tokens):
    x = params["embed"]["kernel"][tokens] @ params["dense"]["kernel"] + params["dense"]["bias"]
    return (jax.nn.relu(x) @ params["head"]["kernel"]).sum()


LEAVES = {
    "embed": {"kernel": shape(5, 2)},
    "dense": {"kernel": shape(2, 3), "bias": shape(3)},
    "head": {"kernel": shape(3, 5)},
}
RULES = one_of({}, {"head": Sign()}, {"^head/kernel$": Spectral(2.0), "dense": Auto()})
NO_RULES = arguments.NO_NORMS | one_of(
    *({"": None}, {"head": "Sign"}, {0: Sign()}, {None: 1}, {"(": Sign()}, {"nowhere": Sign()}),
    *({"head": Sign(layout="oiss")}, {"head": Sign(), "^head": Sign()}),
)
NORM = (arguments.norms(None), arguments.NO_NORMS | arguments.norms("io"))
MAYBE_NORM = (NORM[0] | st.none(), NORM[1].filter(lambda norm: norm is not None))
OF_READING = {
    "function": (one_of(loss, jax.jit(loss)), one_of(None, 3, "loss", LEAVES)),
    "params": (one_of(LEAVES), one_of({}, None, {"w": 1.0}, {"w": jnp.arange(3)}, "w")),
    "last": MAYBE_NORM,
    "first": MAYBE_NORM,
    **dict.fromkeys(("hidden", "embeddings", "vectors"), NORM),
    "rules": (RULES, NO_RULES),
}


@random_cases(20, fault=one_of(None, None, *OF_READING), params=inputs.TREES, data=st.data())
def test_infer_norms(fault, params, data):
    """Also with a tree that is not the program's."""
    values = {name: data.draw(choices[name == fault]) for name, choices in OF_READING.items()}
    leaves = "head/kernel", "dense/kernel", "dense/bias", "embed/kernel"
    if fault not in ("last", "rules") and "head" in str(values["rules"]):
        values["last"] = None  # of which there would be none

    def read():
        function, tree = values.pop("function"), values.pop("params")
        return scion_jax.infer_norms(function, tree, shape(1, dtype="int32"), **values)

    # What is read with a window or as a convolution is refused with its leaf.
    windows = any(isinstance(v, scion_jax.SpectralConv) for v in values.values())
    if fault is not None or windows:
        outcome(read, (fault or "window", *leaves), certain=fault is not None)
        return
    bad = (*inputs.paths_of(params), "'params'")
    assignment = outcome(read)
    outcome(lambda: scion_jax.describe(params, assignment), bad, certain=len(bad) > 1)


def test_nothing_public_is_left_out():
    folder = pathlib.Path(__file__).parent
    files = [*folder.glob("*.py"), *(folder.parent / "support").glob("*.py")]
    text = "".join(path.read_text() for path in files)
    public = {name for name in dir(scion_jax) if callable(getattr(scion_jax, name))}
    assert "scion" in public
    assert not [name for name in public - {"Norm"} if not re.search(rf"\b{name}\b", text)]
