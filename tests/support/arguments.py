"""Values of arguments that users may come with: for every argument good ones and bad ones."""

import fractions
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import scion_jax

NAN, INF = float("nan"), float("inf")


class OwnError(Exception):
    """What a user's own function raises."""


def raising(*_):
    raise OwnError


def one_of(*values):
    return st.sampled_from(values)


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


FLOATS = one_of("float32", "bfloat16", "float16")
SHAPES = st.integers(0, 6).flatmap(lambda rank: st.tuples(*[st.integers(0, 3)] * rank))
ARRAYS = st.builds(jax.ShapeDtypeStruct, SHAPES, FLOATS) | one_of(
    *(np.float32(1), np.ones((2, 3)), np.ones(2, jnp.bfloat16), jnp.asarray(1.0), shape(5, 4))
)
NO_PARAMETERS = one_of(
    *(shape(2, 3, dtype=dtype) for dtype in ("int32", "bool", "complex64", "uint8", "int4")),
    *(shape(dtype=dtype) for dtype in (jnp.float8_e4m3fn, jax.random.key(0).dtype)),
    *(3.0, 2, True, "text", jax.nn.relu, np.array("text"), np.array(None), np.int64(3), object()),
)


@st.composite
def layouts(draw, sizes):
    """A layout that fits, with parts now and then."""
    letters = [draw(one_of(*"iosb")) for _ in sizes] or ["o"]
    if "o" not in letters:
        letters[draw(st.integers(0, len(letters) - 1))] = "o"
    for axis, size in enumerate(sizes):
        kind = draw(st.integers(0, 5)) if letters[axis] in "io" else 0
        if kind == 1:
            equal = [count for count in range(1, 4) if size % count == 0]
            letters[axis] += f"[{draw(one_of(*equal))}]"
        if kind == 2 and size > 1:
            first = draw(st.integers(1, size - 1))
            letters[axis] += f"[{first}, {size - first}]"
    return "".join(letters)


# None of them fits an array of up to six axes of up to three entries.
BAD_LAYOUTS = one_of(
    *("", "i", "ob[2]", "os[3]", "o[]", "o[0]", "o[-1]", "o[1.5]", "o[2", "o]", "ooooooo", "b"),
    *("IO", "io ", "o[x]o", "ox", "o[7]oooo[9,9]oo", "o[9,9]", "oi[2,2]", "io[4]", "ο", "o[²]"),
    *(3, True, ["i", "o"], ("o",), b"io", np.array("io"), {"o": 1}),
) | st.text("oisb[12,", min_size=8, max_size=12)

NUMBERS = one_of(
    *(1.0, 0.5, 1, np.float32(0.5), np.int8(1), fractions.Fraction(1, 2)),
    *(jnp.float32(0.5), jnp.asarray(0.5, jnp.bfloat16), np.array(0.25), jnp.int32(1)),
)
NO_NUMBERS = one_of(
    *("0.1", b"1", None, True, np.True_, 1j, np.complex64(1), jnp.complex64(1), object(), ...),
    *(np.ones(3), jnp.ones((1,)), [0.1], (), {}, {0.1}, np.array("1"), np.array(None)),
    *(jnp.array(True), jax.random.key(0), float, NAN, -1.0, -INF, INF, jnp.float32(NAN)),
    *(np.float16(-1), jnp.asarray(-INF, jnp.bfloat16), np.datetime64("2026-01-01")),
)
SCHEDULES = one_of(
    *(lambda count: 0.5, lambda count: jnp.float32(0.5), lambda count: jnp.bfloat16(1)),
    *(
        optax.constant_schedule(0.5),
        lambda count: 1 / (1 + jnp.float32(count)),
        lambda count: np.float64(0.1),
    ),
)
NO_SCHEDULES = st.one_of(
    NO_NUMBERS.map(lambda value: lambda count: value),
    one_of(raising, lambda: 0.1, lambda count, more: 0.1, lambda count: count + "1", dict),
    one_of(lambda count: {}[count], lambda count: lambda count: 0.1, lambda count: 1 / 0),
    # These show only when they are traced.
    one_of(lambda count: 0.1 if count < 5 else 0.2),
    one_of(lambda count: "x" if isinstance(count, jax.core.Tracer) else 0.1),
)
ORTHOGONALIZERS = one_of(
    scion_jax.NewtonSchulz(),
    scion_jax.NewtonSchulz([(1, 0.5, 0)], steps=2, compute_dtype=jnp.float16, schatten=2),
    scion_jax.NewtonSchulz("quintic"),
    scion_jax.ExactPolar(),
)
NO_ORTHOGONALIZERS = one_of("svd", 5, scion_jax.NewtonSchulz, jnp.linalg.svd, {}, np.ones(2), 0)
NORMS = (
    *(scion_jax.Auto, scion_jax.BiasRMS, scion_jax.ColNorm, scion_jax.Euclidean),
    *(scion_jax.RowNorm, scion_jax.Sign, scion_jax.Spectral, scion_jax.SpectralConv),
)
NO_NORMS = one_of("Spectral", None, 3, scion_jax.Sign, [], np.ones(2), optax.sgd(0.1))

_FLAG = (one_of(True, False), st.nothing())  # bad ones are Python's and JAX's to refuse
_NUMBER = (NUMBERS, NO_NUMBERS | one_of(0, 0.0, lambda count: 1.0))
_SCHEDULE = (NUMBERS | SCHEDULES, NO_NUMBERS | NO_SCHEDULES)
_WHOLE = (one_of(None, 1, 3), one_of(0, -1, 2.0, True, "3", np.ones(2), NAN, 10j))
_DTYPE = (
    st.none() | FLOATS | one_of(jnp.bfloat16, np.dtype("float32")),
    one_of(
        *("bf16", jnp.int8, 3, object(), "bool", jnp.complex64, jnp.float8_e4m3fn, {}, np.ones(2)),
        *([("a", "f4")], lambda x: x, "V", scion_jax.Sign, np.array("float32"), {"names": 3}),
    ),
)
ARGUMENTS = {
    "learning_rate": _SCHEDULE,
    "momentum": _SCHEDULE,
    "rho": (one_of(0, 0.0) | _SCHEDULE[0], _SCHEDULE[1]),
    "optimism": (one_of(0, 0.0) | _SCHEDULE[0], _SCHEDULE[1]),
    "momentum_dtype": _DTYPE,
    "compute_dtype": _DTYPE,
    "weight_decay": (NUMBERS, NO_NUMBERS | SCHEDULES),
    "every_k": (one_of(1, 2, 3.0, jnp.int32(2), np.int64(1)), NO_NUMBERS | one_of(0, 1.5, 1e30)),
    "shard_over": (one_of(None, (), []), one_of(4, ["a", "a"], {"a"}, (1,), b"x", {}, np.ones(2))),
    "radius": _NUMBER,
    "vector_radius": _NUMBER,
    "orthogonalizer": (ORTHOGONALIZERS, NO_ORTHOGONALIZERS),
    "coefficients": (
        one_of("minimax", "quintic", "polar_express", [(1, 2.0, np.float32(3))], np.ones((2, 3))),
        one_of("cubic", "", None, 3, [], [1], [(1, 2)], [(1, 2, "x")], [(1, 2, NAN)], {"abc": 1})
        | one_of([(1, 2, 1j)], np.ones(3), [None], [(INF, 0, 0)], b"quintic", np.ones((2, 3, 4))),
    ),
    "steps": _WHOLE,
    "schatten": (one_of(None, 2, 4), one_of(3, "2", 2.5, True, np.ones(3), [2], INF)),
    "inner": (one_of(scion_jax.scale_by_lmo(scion_jax.Auto()), optax.adam(0.1)), st.nothing()),
    "squared_norm": (one_of(None, lambda w: jnp.ones([])), st.nothing()),
    "rules": (
        one_of([], [("a", "b")], (("^a$", 1), ["", "x"]), [("a|b", ""), ("a", 2.5)]),
        one_of("ab", None, 3, {"a": "b"}, {"a"}, ["ab"], [("a",)], [("a", "b", "c")], [("(", "b")])
        | one_of([("a", None)], [("a", ["b"])], [(1, "b")], [(b"a", "b")], [None], lambda rules: 1)
        | one_of([("a", np.ones(2))], [("a", {1})], np.array([("a", "b")])),
    ),
    "dtype": (FLOATS, _DTYPE[1] | one_of("int32", bool)),
    "approximate": _FLAG,
    "x": (ARRAYS, NO_PARAMETERS | one_of(None, [1.0])),
    "matrix": (
        st.builds(jax.ShapeDtypeStruct, SHAPES.map(lambda sizes: (2, 3, *sizes)), FLOATS),
        NO_PARAMETERS | one_of(None, shape(), shape(3), np.ones(2), jnp.asarray(1.0)),
    ),
    **dict.fromkeys(("per_leaf", "short_step", "unconstrained"), _FLAG),
    **dict.fromkeys(("normalized", "max", "zero_init", "constrained"), _FLAG),
}


@st.composite
def argument(draw, name):
    """A value for an argument, and the name if the value is bad."""
    is_bad = not ARGUMENTS[name][1].is_empty and draw(st.booleans())
    return draw(ARGUMENTS[name][is_bad]), (name,) * is_bad


@st.composite
def arguments(draw, function, fault=False, without=("norms", "param_labels", "layout")):
    """Keyword arguments; with a fault, one of them is bad, whose name comes too."""
    known = inspect.signature(function).parameters
    names = [name for name in known if name not in without]
    needed = [name for name in names if known[name].default is inspect.Parameter.empty]
    chosen = {*needed, *draw(st.sets(one_of(*names)))} if names else set()
    values = {name: draw(ARGUMENTS[name][0]) for name in names if name in chosen}
    if not fault:
        return values
    name = draw(one_of(*(name for name in names if not ARGUMENTS[name][1].is_empty)))
    return {**values, name: draw(ARGUMENTS[name][1])}, (name,)


@st.composite
def norms(draw, layout):
    """A norm with a layout, or with None, that it can read."""
    fits = [kind for kind in NORMS if kind is not scion_jax.SpectralConv or "s" in (layout or "")]
    kind = draw(one_of(*fits))
    return kind(**draw(arguments(kind)), layout=layout)
