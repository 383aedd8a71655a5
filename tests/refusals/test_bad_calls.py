"""Whatever comes in beside trees, it works, or is refused in our words; see `test_bad_input`."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

import scion_jax
from scion_jax import Auto, Sign, Spectral
from tests.support import arguments, inputs
from tests.support.arguments import BAD_LAYOUTS, NO_PARAMETERS, one_of, shape
from tests.support.refusals import outcome, random_cases, traced, types

pytestmark = pytest.mark.unoptimized


@random_cases(30, kind=one_of(*arguments.NORMS), sizes=arguments.SHAPES, data=st.data())
def test_norms(kind, sizes, data):
    layout, values = data.draw(arguments.layouts(sizes)), data.draw(arguments.arguments(kind))
    start = data.draw(arguments.arguments(kind.init, without=("self", "shape"))) | {"shape": sizes}
    array = shape(*sizes, dtype=data.draw(arguments.FLOATS))
    fault = data.draw(one_of("", "argument", "layout", "array", "init"))
    bad, certain = (), True
    if kind is scion_jax.SpectralConv and "s" not in layout:
        bad = ("no window",)
    if fault == "argument":
        values, name = data.draw(arguments.arguments(kind, fault=True))
        bad = (*bad, *name)
    if fault == "layout":
        layout = data.draw(BAD_LAYOUTS)
        bad, certain = (*bad, "layout"), kind is not scion_jax.Auto  # which ignores it for vectors
    if fault == "array":
        array = data.draw(NO_PARAMETERS | st.none())
        bad = (*bad, "array")
    if fault == "init":
        more, name = data.draw(arguments.arguments(kind.init, fault=True, without=("self",)))
        start, bad = start | more, (*bad, *name)

    def call(array):
        norm = kind(**values, layout=layout)
        return norm.lmo(array), norm.init(**start), norm.gauge(array), norm.dual_norm(array)

    result = outcome(lambda: traced(call, array), bad, certain)
    if result is not None:
        assert types(result[0]) == types(array)
        assert types(result[1]) == types(shape(*sizes, dtype=start.get("dtype", "float32")))


FUNCTIONS = [
    *(scion_jax.scaled_relu, scion_jax.scaled_gelu, scion_jax.scaled_relu_squared),
    *(scion_jax.orthogonalize, scion_jax.NewtonSchulz, scion_jax.label_by_path),
    *(scion_jax.average_gradients, scion_jax.scale_by_lmo),
    *(scion_jax.clip_by_pairing, scion_jax.measure_pairing),
]
IN_MESSAGES = {"norm": "a Norm", "rules": "rule"}


@random_cases(25, function=one_of(*FUNCTIONS), fault=st.booleans(), data=st.data())
def test_functions(function, fault, data):
    values = data.draw(arguments.arguments(function, fault))
    values, bad = values if fault else (values, ())
    bad = tuple(IN_MESSAGES.get(name, name) for name in bad)

    def call(values):
        result = function(**values)
        return result if isinstance(result, jax.Array) else None

    # Of a schedule some faults show when it is called a second time.
    outcome(lambda: traced(call, values), bad, certain={"rho", "momentum"}.isdisjoint(bad))


@random_cases(5, case=inputs.cases(["single"]), others=inputs.TREES, data=st.data())
def test_pairings(case, others, data):
    """Of a state that keeps them, of one that does not, and of something else."""
    optimizer = scion_jax.scion(0.1, case.norms, show_pairing=data.draw(st.booleans()))
    params = data.draw(one_of(case.params, others))
    other = data.draw(one_of(..., None, 3, "state", {"pairings": jnp.ones(2)}, params))

    def call(params):
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
    files = ("arguments.py", "inputs.py", "test_bad_calls.py", "test_bad_input.py")
    text = "".join((pathlib.Path(__file__).parent / name).read_text() for name in files)
    public = {name for name in dir(scion_jax) if callable(getattr(scion_jax, name))}
    assert "scion" in public
    assert not [name for name in public if not re.search(rf"\b{name}\b", text)]
