"""Roles: what each parameter of a program is, from all of its uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

from scion_jax.labels import leaf_path
from scion_jax.reading._control_flow import Reader
from scion_jax.reading._letters import MATRIX
from scion_jax.reading._live import differentiable
from scion_jax.reading._primitives import RULES
from scion_jax.reading._uses import EMBEDDING, UNKNOWN, VECTOR, WEAK, Use, Uses
from scion_jax.reading._values import Data, Weight
from scion_jax.reading._views import whole


class Role(NamedTuple):
    """What a parameter is to the program that uses it.

    Attributes:
        path: Where it stands in its tree, such as `"head/kernel"`.
        shape: Its shape.
        kind: `"matrix"`, `"embedding"`, `"tied"` (looked up and multiplied with), `"vector"`,
            `"unused"` (no gradient reaches it) or `"unknown"`.
        layout: Its layout; see `scion_jax.norms.layout`. Empty for the last two kinds.
        first: Whether it takes the inputs, with no product before.
        last: Whether its result reaches the outputs, with no product after.
        used_at: Where it is used, such as `"dot_general model.py:41"`.
        problem: For `"unknown"`, what is not known; for complex numbers, that no norm is.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    layout: str
    first: bool = False
    last: bool = False
    used_at: tuple[str, ...] = ()
    problem: str = ""


def read_roles(
    function: Callable[..., Any], params: Any, *inputs: Any, has_aux: bool = False
) -> list[Role]:
    """Reads off a program what each of its parameters is.

    The program is traced, and nothing is computed. What it does with a parameter tells what that
    is: an axis that is contracted with data is an input, one that a product brings to its result an
    output, and so on.

    Args:
        function: The loss, or the forward pass: `function(params, *inputs)`.
        params: Its parameters: any tree of arrays or `jax.ShapeDtypeStruct`s, or an NNX module.
            Leaves that are no floating arrays belong to the program.
        *inputs: Its other arguments: trees of arrays or shapes. Anything else in them is passed on.
        has_aux: Whether the function returns a pair, of which the second is no part of the loss.

    Returns:
        A role for each parameter, in the tree's order. A parameter that cannot be read gets the
        kind `"unknown"`, and its `problem` says why.

    Raises:
        TypeError: If `function` is not callable or, with `has_aux`, returns no pair, or if `params`
            has no floating arrays.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(params, x):
        ...     return jnp.sum(jax.nn.relu(x @ params["kernel"] + params["bias"]))
        >>> params = {"bias": jnp.zeros(64), "kernel": jnp.zeros((16, 64))}
        >>> roles = read_roles(loss, params, jnp.ones((8, 16)))
        >>> [(role.path, role.kind, role.layout) for role in roles]
        [('bias', 'vector', 'o'), ('kernel', 'matrix', 'io')]
    """
    if not callable(function):
        raise TypeError(f"function is the loss or the forward pass of a model; got {function!r}")
    if not isinstance(has_aux, bool):
        raise TypeError(f"has_aux is True or False; got {has_aux!r}")
    function, params, inputs = _without_modules(function, params, inputs)
    leaves, rebuild = _arrays(params, floating=True)
    if not leaves:
        raise TypeError("params has no floating array: give the parameters of the function first")
    others, rebuild_inputs = _arrays(inputs, floating=False)

    def program(parameters: list[Any], arguments: list[Any]) -> Any:
        outputs = function(rebuild(parameters), *rebuild_inputs(arguments))
        if has_aux:
            if not (isinstance(outputs, tuple) and len(outputs) == 2):
                raise TypeError(f"has_aux=True: the function returns no pair, but {outputs!r}")
            outputs = outputs[0]
        return [x for x in jax.tree.leaves(outputs) if hasattr(x, "dtype")]

    closed = jax.make_jaxpr(program)([leaf for _, leaf in leaves], [leaf for _, leaf in others])
    reader = Reader(RULES)
    jaxpr, uses = closed.jaxpr, reader.uses
    weights = [Weight((whole(n, leaf.shape),)) for n, (_, leaf) in enumerate(leaves)]
    live = [True] * len(jaxpr.outvars)
    outputs = reader.read(jaxpr, closed.consts, [*weights, *[Data(fresh=True)] * len(others)], live)
    uses.live = True
    for atom, value in zip(jaxpr.outvars, outputs, strict=True):
        value = uses.settle(value) if isinstance(value, Weight) and value.data else value
        if isinstance(value, Data) and differentiable(atom):
            uses.consume(value.views)
            uses.note("reached", value.pending)
            uses.note("suspected", value.suspects)
    reached = reader.liveness.variables(jaxpr, live)
    pieces: dict[Any, set[Any]] = {}
    for word, key, *more in uses.notes:
        if word == "piece" and ("whole", key) not in uses.notes:
            pieces.setdefault(key, set()).add(more[0])
    found: dict[Any, list[tuple[Any, Use]]] = {}
    for use in uses.found:
        found.setdefault(use.view.source, []).append((use, use))
    roles, places = [], {}
    for n, ((keys, leaf), variable) in enumerate(zip(leaves, jaxpr.invars, strict=False)):
        role = Role(leaf_path(keys), tuple(leaf.shape), "unused", "")
        if variable in reached:
            role = _role(role.path, role.shape, found.get(n, []), uses, pieces, places)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) and not role.problem:
            role = role._replace(problem="no norm is known for complex numbers")
        roles.append(role)
    return roles


def _role(
    path: str,
    shape: Sequence[int],
    entries: list[tuple[Any, Use]],
    uses: Uses,
    pieces: Mapping[Any, set[Any]],
    places: dict[Any, str],
) -> Role:
    """Finds what all uses of a parameter agree on."""
    shape = tuple(shape)
    strong = [e for e in entries if e[1].kind != WEAK and ("demoted", e[0]) not in uses.notes]
    strong = [e for e in strong if not e[1].transposed] or strong
    counted = strong or entries
    used_at = tuple(dict.fromkeys(_place(use, places) for _, use in counted))
    unknown = Role(path, shape, "unknown", "", used_at=used_at)
    if not counted:
        return unknown._replace(problem="it reaches the output without meeting data")
    problems = [use.problem for _, use in counted if use.kind == UNKNOWN]
    if problems:
        return unknown._replace(problem=problems[0])
    if any(("suspected", key) in uses.notes for key, _ in counted):
        return unknown._replace(
            problem="its result is used as a weight: data may change it, or mix it"
        )
    kinds = {use.kind for _, use in counted}
    if kinds == {WEAK} and any(use.problem for _, use in counted):
        return unknown._replace(problem=next(use.problem for _, use in counted if use.problem))
    if kinds == {WEAK}:
        if len(shape) > 1 and all(set(use.letters) <= {"-", None} for _, use in counted):
            return unknown._replace(problem="only a statistic of it is used")
        kinds = {VECTOR}
    looked_up = EMBEDDING in kinds
    if kinds == {EMBEDDING, VECTOR}:
        kinds = {EMBEDDING}
    if kinds == {EMBEDDING, MATRIX}:
        kinds = {MATRIX}
    if len(kinds) > 1:
        return unknown._replace(problem=f"its uses disagree: {_listed(counted, places)}")
    (kind,) = kinds
    agreeing = [(key, use) for key, use in counted if use.kind == kind or kind == VECTOR]
    letters = _agreed([use for _, use in agreeing], shape)
    if letters is None:
        return unknown._replace(problem=f"its uses disagree: {_listed(counted, places)}")
    for axis, letter in enumerate(letters):  # an ensemble's members, which lead
        stack = any(("stack", key, axis) in uses.notes for key, _ in agreeing)
        if stack and letter == "o" and "i" not in letters[:axis] and "o" in letters[axis + 1 :]:
            letters[axis] = "b"
    if kind == VECTOR:
        letters = ["b" if x == "b" else "o" for x in letters]
    missing = "o" if kind == EMBEDDING else None
    letters = [x or missing or ("i" if "i" not in letters else "o") for x in letters]
    parts = _parts(agreeing, letters, shape, pieces)
    if shape and "o" not in letters:  # a stack of numbers, each on its own
        letters[-1], parts[-1] = "o", f"[{shape[-1]}]" if shape[-1] > 1 else ""
    layout = "".join(a + b for a, b in zip(letters, parts, strict=True))
    keys = {key for key, use in agreeing if use.kind == MATRIX}
    tied = kind == MATRIX and looked_up
    return Role(
        path, shape, "tied" if tied else kind, "o" if not shape else layout,
        first=bool(keys) and all(use.fresh for key, use in agreeing),
        last=any(("reached", key) in uses.notes for key in keys)
        and not any(("followed", key) in uses.notes for key in keys),
        used_at=used_at,
    )  # fmt: skip


def _agreed(uses: Sequence[Use], shape: Sequence[int]) -> list[str | None] | None:
    """Finds the letter of each axis; None where uses disagree."""
    letters: list[str | None] = []
    for axis, size in enumerate(shape):
        found = {use.letters[axis] for use in uses} - {None, "?"}
        if len(found) > 1 and size == 1:
            found = found & {"i", "o"} if len(found & {"i", "o"}) == 1 else {"o"}
        if "g" in found:
            found = {"o"} if found <= {"g", "o"} else found
        if found == {"b", "o"} and all(use.kind in (VECTOR, WEAK) for use in uses):
            found = {"b"}
        if len(found) > 1:
            return None
        letters.append(next(iter(found), None))
    return letters


def _parts(
    entries: Sequence[tuple[Any, Use]],
    letters: list[str],
    shape: Sequence[int],
    pieces: Mapping[Any, set[Any]],
) -> list[str]:
    """Finds the parts of each axis, as text; turns axes of which each entry is one into `b`."""
    texts = [""] * len(shape)
    outermost = next((a for a, x in enumerate(letters) if x == "o" and shape[a] > 1), None)
    vector = all(use.kind != MATRIX for _, use in entries)
    for axis, letter in enumerate(letters):
        size = shape[axis]
        if letter not in ("i", "o") or size < 2:
            continue
        groups = [(use.letters[axis] == "g" and size) or use.groups[axis] for _, use in entries]
        spans = {use.spans[axis] for _, use in entries}
        if axis == outermost:
            spans = {piece[axis] for key, _ in entries for piece in pieces.get(key, ())} or spans
        if max(groups) > 1:
            texts[axis] = f"[{groups[0]}]" if len(set(groups)) == 1 else ""
            continue
        if (
            vector
            and axis == 0
            and len(shape) > 1
            and (0, size) not in spans
            and "o" in letters[1:]
        ):
            letters[axis] = "b"  # rows that are used apart
            continue
        sizes = _tiles(spans, size)
        if len(sizes) < 2:
            continue
        if set(sizes) == {1}:
            if letters.count(letter) > 1:
                letters[axis] = "b"
        elif len(set(sizes)) == 1:
            texts[axis] = f"[{len(sizes)}]"
        else:
            texts[axis] = f"[{','.join(map(str, sizes))}]"
    return texts


def _tiles(spans: set[tuple[int, int]], size: int) -> list[int]:
    """Merges ranges that overlap; returns their sizes if they cover the axis, else nothing."""
    merged: list[list[int]] = []
    for start, stop in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])
    ends = [0, *(stop for _, stop in merged)]
    covers = [start for start, _ in merged] == ends[:-1] and ends[-1] == size
    return [stop - start for start, stop in merged] if covers else []


def _place(use: Use, known: dict[Any, str]) -> str:
    name = use.equations[0].primitive.name
    for equation in use.equations:  # those of library functions may have no place of their own
        trace = equation.source_info.traceback
        if trace not in known:  # layers in a loop share theirs
            file, *line = source_info_util.summarize(equation.source_info).split(" ")[0].split(":")
            file = file.replace("\\", "/").rsplit("/", 1)[-1]
            known[trace] = f" {file}:{line[0]}" if line else ""
        if known[trace]:
            return name + known[trace]
    return name


def _listed(entries: Sequence[tuple[Any, Use]], places: dict[Any, str]) -> str:
    texts = [
        f"{use.kind} {''.join(x or '?' for x in use.letters)} ({_place(use, places)})"
        for _, use in entries
    ]
    return "; ".join(dict.fromkeys(texts))


def _arrays(tree: Any, floating: bool) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]]:
    """Takes arrays out of a tree; returns them with their paths, and what puts them back."""
    entries, structure = jax.tree_util.tree_flatten_with_path(tree)

    def is_taken(leaf: Any) -> bool:
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
            return False
        return not floating or jnp.issubdtype(leaf.dtype, jnp.inexact)

    places = [n for n, (_, leaf) in enumerate(entries) if is_taken(leaf)]

    def rebuild(arrays: list[Any]) -> Any:
        leaves = [leaf for _, leaf in entries]
        for place, array in zip(places, arrays, strict=True):
            leaves[place] = array
        return structure.unflatten(leaves)

    return [entries[place] for place in places], rebuild


def _without_modules(function: Any, params: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Splits an NNX module into its parameters, a function of them, and what else it holds."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.Module):
        return function, params, inputs
    graph, state, rest = nnx.split(params, nnx.Param, ...)

    def merged(state: Any, rest: Any, *inputs: Any) -> Any:
        return function(nnx.merge(graph, state, rest, copy=True), *inputs)

    return merged, state, (rest, *inputs)
