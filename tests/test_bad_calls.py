"""Whatever comes in beside trees, it works, or is refused in our words; see `test_bad_input`."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from hypothesis import strategies as st

import arguments
import inputs
import scion_jax
from arguments import BAD_LAYOUTS, NO_PARAMETERS, one_of, shape
from refusals import outcome, random_cases, traced, types
from scion_jax import Auto, Sign, Spectral

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


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(5, 2, rngs=rngs)
        self.dense = nnx.Linear(2, 3, rngs=rngs)
        self.head = nnx.Linear(3, 5, rngs=rngs)


class Module(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(5, 2, name="embed")(tokens)
        return linen.Dense(5, name="head")(linen.Dense(3, name="dense")(x))


MODELS = [(nnx.eval_shape(Net),), (Module(), shape(1, dtype="int32"))]
PATTERNS = one_of({}, {"head": Sign()}, {"^head/kernel$": Spectral(2.0), "dense": Auto()})
NO_PATTERNS = arguments.NO_NORMS | one_of(
    *({"": None}, {"head": "Sign"}, {0: Sign()}, {None: 1}, {"(": Sign()}, {"nowhere": Sign()}),
    *({"head": Sign(layout="oiss")}, {"head": Sign(), "^head": Sign()}),
)
OF_FLAX = {
    "model": (
        one_of(*MODELS),
        one_of((None,), (Net,), (Module,), ({"w": 1.0},), (MODELS[0][0], 1)),
    ),
    "hidden": (arguments.norms(None), arguments.NO_NORMS | arguments.norms("io")),
    "vectors": (arguments.norms(None), arguments.NO_NORMS | arguments.norms("o")),
    "last": (PATTERNS, NO_PATTERNS),
    "rules": (PATTERNS, NO_PATTERNS),
}


@random_cases(20, fault=one_of(None, None, *OF_FLAX), params=inputs.TREES, data=st.data())
def test_flax_norms(fault, params, data):
    """Also with a tree that is not the model's."""
    values = {name: data.draw(choices[name == fault]) for name, choices in OF_FLAX.items()}
    model = values.pop("model")

    def read():
        return scion_jax.flax_norms(*model, **values)

    if fault is not None:
        said = {"model": "NNX"}.get(fault, fault)
        outcome(read, (said, "'head/kernel'"))  # what `head` finds twice, too
        return
    result = outcome(read, ("finds leaves that",), certain=False)
    if result is not None:
        bad = (*inputs.paths_of(params), "'params'")
        outcome(lambda: scion_jax.describe(params, *result), bad, certain=len(bad) > 1)


def test_nothing_public_is_left_out():
    files = ("arguments.py", "inputs.py", "test_bad_calls.py", "test_bad_input.py")
    text = "".join((pathlib.Path(__file__).parent / name).read_text() for name in files)
    public = {name for name in dir(scion_jax) if callable(getattr(scion_jax, name))}
    assert "scion" in public
    assert not [name for name in public if not re.search(rf"\b{name}\b", text)]
