"""Roles: what each parameter of a program is, from all of its uses."""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scion_jax._paths import leaf_path
from scion_jax.reading._control_flow import Reader
from scion_jax.reading._layouts import Notes, layout_of
from scion_jax.reading._meetings import settle
from scion_jax.reading._primitives import RULES
from scion_jax.reading._steps import Step, after
from scion_jax.reading._uses import EMBEDDING, MATRIX, UNKNOWN, VECTOR, WEAK, Use
from scion_jax.reading._values import Data, Weight
from scion_jax.reading._views import whole


class Role(NamedTuple):
    """What a parameter is to the program that uses it.

    Attributes:
        path: Where it stands in its tree, such as `"head/kernel"`.
        shape: Its shape.
        kind: `"matrix"`, `"embedding"`, `"tied"` (looked up and multiplied with), `"vector"`,
            `"unused"` (no gradient reaches it) or `"unknown"`.
        layout: Its layout; see `scion_jax.Norm`. Empty for the last two kinds.
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
    function: Callable[..., Any],
    params: Any,
    *inputs: Any,
    has_aux: bool = False,
    heads: str = "together",
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
        heads: `"together"`, or `"apart"`: an attention head is a matrix of its own.

    Returns:
        A role for each parameter, in the tree's order. A parameter that cannot be read gets the
        kind `"unknown"`, and its `problem` says why.

    Raises:
        TypeError: If `function` is not callable or, with `has_aux`, returns no pair, or if `params`
            has no floating arrays.
        ValueError: If `heads` is neither.

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
    if heads not in ("together", "apart"):
        raise ValueError(f"heads is 'together' or 'apart'; got {heads!r}")
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
    reader, roots = Reader(RULES, heads == "apart"), [Step([]) for _ in leaves]
    uses = reader.uses
    weights = [Weight((whole(n, leaf.shape),)) for n, (_, leaf) in enumerate(leaves)]
    data = (Data(fresh=True), None)
    outputs = reader.read(closed, [*zip(weights, roots, strict=True), *[data] * len(others)])
    uses.step = after(step for _, step in outputs)
    for value, step in outputs:
        value = settle(uses, value) if isinstance(value, Weight) and value.data else value
        if isinstance(value, Data) and step is not None:
            uses.consume(value.views)
            uses.note("reached", value.pending)
            uses.note("suspected", value.suspects)
    reached = uses.step.reached()
    found: list[list[Use]] = [[] for _ in leaves]
    for use, steps in uses.found.items():
        if not reached.isdisjoint(steps):
            found[use.view.source].append(use)
    notes: Notes = collections.defaultdict(set)
    for word, use, *more in uses.notes:
        notes[use].add((word, *more))
    roles = []
    for (keys, leaf), root, own in zip(leaves, roots, found, strict=True):
        role = Role(leaf_path(keys), tuple(leaf.shape), "unused", "")
        if root in reached:
            role = _role(role.path, role.shape, own, notes)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) and not role.problem:
            role = role._replace(problem="no norm is known for complex numbers")
        roles.append(role)
    return roles


# What a parameter is whose uses are of several kinds.
_KINDS = {
    frozenset({MATRIX}): MATRIX,
    frozenset({MATRIX, EMBEDDING}): MATRIX,
    frozenset({EMBEDDING}): EMBEDDING,
    frozenset({EMBEDDING, VECTOR}): EMBEDDING,
    frozenset({VECTOR}): VECTOR,
    frozenset({WEAK}): VECTOR,
}


def _role(path: str, shape: tuple[int, ...], uses: Sequence[Use], notes: Notes) -> Role:
    """Finds what all uses of a parameter agree on."""
    strong = [use for use in uses if use.kind != WEAK and ("demoted",) not in notes[use]]
    uses = [use for use in strong if not use.transposed] or strong or uses
    used_at = tuple(dict.fromkeys(use.place for use in uses))
    kinds = frozenset(use.kind for use in uses)
    kind = _KINDS.get(kinds)
    agreeing = [use for use in uses if use.kind == kind or kind == VECTOR]
    layout = layout_of(kind, agreeing, shape, notes) if kind else None
    problem = _problem(uses, notes, layout, len(shape))
    if problem or kind is None or layout is None:
        return Role(path, shape, "unknown", "", used_at=used_at, problem=problem)
    results = [notes[use] for use in agreeing if use.kind == MATRIX]
    return Role(
        path, shape, "tied" if kinds == {MATRIX, EMBEDDING} else kind, layout,
        first=bool(results) and all(use.fresh for use in agreeing),
        last=any(("reached",) in became for became in results)
        and not any(("followed",) in became for became in results),
        used_at=used_at,
    )  # fmt: skip


def _problem(uses: Sequence[Use], notes: Notes, layout: str | None, rank: int) -> str:
    """Says why a parameter cannot be read, if so."""
    if not uses:
        return "it reaches the output without meeting data"
    problems = [use.problem for use in uses if use.kind == UNKNOWN]
    if any(("suspected",) in notes[use] for use in uses):
        problems.append("its result is used as a weight: data may change it, or mix it")
    if all(use.kind == WEAK for use in uses):
        problems += [use.problem for use in uses if use.problem]
        if rank > 1 and all({*use.letters} <= {"-", None} for use in uses):
            problems.append("only a statistic of it is used")
    if layout is None:
        texts = [
            f"{use.kind} {''.join(x or '?' for x in use.letters)} ({use.place})" for use in uses
        ]
        problems.append(f"its uses disagree: {'; '.join(dict.fromkeys(texts))}")
    return problems[0] if problems else ""


def _arrays(tree: Any, floating: bool) -> tuple[list[tuple[Any, Any]], Callable[[list[Any]], Any]]:
    """Takes arrays out of a tree; returns them with their paths, and what puts them back."""
    entries, structure = jax.tree_util.tree_flatten_with_path(tree)

    taken = [
        hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and (not floating or jnp.issubdtype(leaf.dtype, jnp.inexact))
        for _, leaf in entries
    ]

    def rebuild(arrays: list[Any]) -> Any:
        left = iter(arrays)
        pairs = zip(taken, entries, strict=True)
        return structure.unflatten([next(left) if take else leaf for take, (_, leaf) in pairs])

    return list(itertools.compress(entries, taken)), rebuild


def _without_modules(function: Any, params: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Splits an NNX module into its parameters, a function of them, and what else it holds."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(params, nnx.Module):
        return function, params, inputs
    graph, state, rest = nnx.split(params, nnx.Param, ...)

    def merged(state: Any, rest: Any, *inputs: Any) -> Any:
        return function(nnx.merge(graph, state, rest, copy=True), *inputs)

    return merged, state, (rest, *inputs)
