"""What programs' parameters are read as, in few letters; short words for tables of them.

A parameter is what it is to its loss: `"io"` is a matrix, `"o"` a vector, and what is something
else says so: `"embedding io"`.
"""

import re

import jax
import jax.numpy as jnp
import optax

from scion_jax import infer_norms
from scion_jax.norms._layout import parse_layout
from scion_jax.reading import read_roles

ORDINARY = ("first", "hidden", "vectors", "matrix", "vector")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def squares(outputs):
    """A loss: the mean of the squares of all that a model returns."""
    return sum(jnp.mean(jnp.square(output)) for output in jax.tree.leaves(outputs))


def cross_entropy(logits, classes):
    """Another one: how unlikely the classes are."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


def normal(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


# What is found.


def in_letters(kind, layout):
    """Leaves out what a layout tells anyway."""
    if kind not in ORDINARY:
        return f"{kind} {layout}".strip()
    assert kind.startswith("vector") == (not re.search("[is]", layout)), (kind, layout)
    return layout


def roles_of(function, params, *inputs):
    """Reads a program, and checks that all layouts are layouts."""
    roles = {role.path: role for role in read_roles(function, params, *inputs)}
    for role in roles.values():
        assert role.kind in ("matrix", "embedding", "tied", "vector", "unused", "unknown"), role
        assert bool(role.layout) == (role.kind not in ("unused", "unknown")), role
        assert role.problem or role.kind != "unknown", role
        if role.layout:
            parse_layout(role.layout, role.shape)
    return roles


def read(function, params, *inputs, **options):
    """Reads a program; returns a table of what `infer_norms` makes of it."""
    assignment = infer_norms(function, params, *inputs, **{"last": None, **options})
    table = {}
    for entry in assignment.entries:
        word, layout = entry.label.rsplit(" ", 1)
        assert entry.norm.layout == layout
        table[entry.path.removeprefix("params/")] = in_letters(word, layout)
    return table


# Programs of which a text says what their inputs and parameters are; see `test_programs`.

INPUTS = {
    "ROWS": shape(6, 5),
    "SEQUENCE": shape(2, 9, 8),
    "WIDE": shape(2, 5, 32),
    "IMAGES": shape(2, 8, 8, 4),
    "TOKENS": shape(2, 9, dtype=jnp.int32),
    "LABELS": shape(6, dtype=jnp.int32),
    "KEY": jax.eval_shape(lambda: jax.random.key(0)),
}


def spelled(text, dtype=jnp.float32):
    """Inputs, parameters, and which readings are right for each of these, by name."""
    inputs, params, right = {}, {}, {}
    for name, reading, sizes in re.findall(r"(\w+): (.*?)((?: ?\b\d+)*)(?:, |$)", text):
        array = shape(*map(int, sizes.split()), dtype=dtype)
        if reading in INPUTS or not reading:
            inputs[name] = INPUTS.get(reading, array)
        else:
            params[name], right[name] = array, reading.split("/")
    return inputs or {"x": INPUTS["ROWS"]}, params, right


def programs(table, names):
    """Reads a table of programs, which may use names: text and function by name."""
    found = {}
    for row in re.split(r"\n(?! )", table.strip()):
        if not row.startswith("#"):
            name, text, program = (" ".join(part.split()) for part in row.split(" |", 2))
            inputs, params, _ = spelled(text)
            found[name] = text, eval(f"lambda {', '.join(inputs | params)}: {program}", names)
    return found


def disagreements(text, function, *others):
    """Reads a program; returns what is read as something else than is right."""
    inputs, params, right = spelled(text)
    roles = roles_of(lambda params, xs: squares(function(**xs, **params)), params, inputs)
    found = {name: in_letters(role.kind, role.layout) for name, role in roles.items()}
    return {name: text for name, text in found.items() if text not in [*right[name], *others]}


# Tables of layers: paths and letters.


def of(kernel, bias=None):
    return {"kernel": kernel} | ({"bias": bias} if bias else {})


LINEAR, NORM = of("io", "o"), {"scale": "o", "bias": "o"}


def under(*prefixes_and_table):
    *prefixes, table = prefixes_and_table
    return {f"{prefix}/{path}": layout for prefix in prefixes for path, layout in table.items()}


ATTENTION = {
    **under("query", "key", "value", of("ioo", "oo")),
    **under("out", of("iio", "o")),
}


def stack(table, axis=0):
    """Layers along an axis; numbers that are stacked are a vector of one entry each."""
    stacked = {}
    for path, layout in table.items():
        letters = re.findall(r"\w(?:\[.*?\])?", layout)
        letters.insert(len(letters) + 1 + axis if axis < 0 else axis, "b")
        stacked[path] = "".join(letters)
    return stacked
