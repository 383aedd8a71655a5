"""What is refused, and how it is said: hyperparameters, arrays and trees.

Only what is there to be seen is looked at: plain numbers and concrete arrays. Traced values pass
(`optax.inject_hyperparams`, `jax.vmap` over radii). A schedule is asked for its value at the first
update, since the mistakes that happen (None, a vector, 0.95 for 0.05) show there; what it returns
later is brought into its range.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from scion_jax._numerics import is_number
from scion_jax._paths import leaf_path

FLOATING = ("float16", "bfloat16", "float32", "float64")


class _Range(NamedTuple):
    words: str
    low: float
    high: float
    without_low: bool = False
    whole: bool = False

    def holds(self, number: float) -> bool:
        above = number > self.low if self.without_low else number >= self.low
        inside = above and number <= self.high and math.isfinite(number)
        return inside and (number == int(number) or not self.whole)


# What each number may be. A schedule that leaves its range later on is clipped to it.
_RANGES = {
    "learning_rate": _Range("at least 0 and finite", 0, math.inf),
    "step": _Range("at least 0 and at most 1", 0, 1),
    "momentum": _Range("above 0 and at most 1", 0, 1, without_low=True),
    "optimism": _Range("at least 0 and at most 1", 0, 1),
    "rho": _Range("at least 0 and finite", 0, math.inf),
    "weight_decay": _Range("at least 0 and finite", 0, math.inf),
    "radius": _Range("above 0 and finite", 0, math.inf, without_low=True),
    "count": _Range("a whole number of at least 1", 1, 2**31 - 1, whole=True),
}


def check_number(kind: str, value: object, name: str) -> None:
    """Checks that an argument is one number in its range.

    Args:
        kind: Which range: a key of the table above.
        value: What was given.
        name: What the argument is called.

    Raises:
        TypeError: If it is neither a number nor an array of numbers.
        ValueError: If it has a shape, is NaN, or lies outside of the range.
    """
    _check_type(value, name)
    if isinstance(value, jax.core.Tracer):
        return
    if not _RANGES[kind].holds(float(value)):  # pyright: ignore[reportArgumentType]
        raise ValueError(f"{name} must be {_RANGES[kind].words}; got {value}")


def _check_type(value: object, name: str) -> None:
    if is_number(value):
        return
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} must be a number; got an array of dtype {value.dtype}")
    if value.shape:
        raise ValueError(f"{name} must be one number; got an array of shape {value.shape}")


def check_schedule(kind: str, value: object, name: str) -> None:
    """Checks a number as `check_number` does, and a schedule by its value at the first update."""
    if callable(value):
        with jax.ensure_compile_time_eval():
            value = _called(value, jnp.zeros([], jnp.int32), name)
        name = f"{name}, a schedule, at the first update"
    check_number(kind, value, name)


def check_momentum(momentum: object, dtype: DTypeLike | None) -> None:
    """Checks α and the dtype of its buffer, and warns of a momentum that others call so."""
    check_schedule("momentum", momentum, "momentum (1 minus the usual momentum)")
    check_dtype("momentum_dtype", dtype)
    if is_number(momentum) and 0.8 <= momentum < 1:
        warn(
            f"momentum is 1 minus the usual momentum, and {momentum} forgets almost everything at "
            f"every step; write {1 - momentum:.3g} for what others call {momentum}"
        )


def value_at(kind: str, value: Any, count: ArrayLike, name: str) -> ArrayLike:
    """Evaluates a number or a schedule.

    Args:
        kind: Which range: a key of the table above.
        value: A number, or a function of the number of updates made.
        count: The number of updates made.
        name: What the argument is called.

    Returns:
        The number, which may be traced; what a schedule returns is clipped to its range.

    Raises:
        TypeError: If the function does not take a count, or does not return a number.
    """
    if not callable(value):
        return value
    number, (_, low, high, *_) = _called(value, count, name), _RANGES[kind]
    if is_number(number):
        return min(max(number, low), high)
    number = jnp.maximum(number, low)
    return number if high == math.inf else jnp.minimum(number, high)


def _called(schedule: Any, count: ArrayLike, name: str) -> Any:
    described = getattr(schedule, "__name__", repr(schedule))
    try:
        number = schedule(count)
    except TypeError as error:
        raise TypeError(
            f"{name} is a number or a schedule, a function of the number of updates made; calling "
            f"{described} with a count failed ({error})"
        ) from error
    except Exception as error:
        error.add_note(f"This is of {name}: the schedule {described} was given a count.")
        raise
    _check_type(number, f"{name}, a schedule,")
    return number


def check_dtype(name: str, dtype: DTypeLike | None) -> None:
    """Raises `TypeError` unless a dtype is one to compute with, or None."""
    try:
        known = dtype is None or str(jnp.dtype(dtype)) in FLOATING
    except (TypeError, ValueError):
        known = False
    if not known:
        raise TypeError(
            f"{name} must be a floating dtype, one of {', '.join(FLOATING)}; got {dtype!r}"
        )


def check_array(leaf: Any, name: str) -> None:
    """Raises `TypeError` unless something is an array, or the shape of one, that can be optimized.

    Args:
        leaf: An array, or anything with its `shape` and `dtype`.
        name: What to call it, such as `"leaf 'head/kernel'"`.
    """
    elsewhere = "(optax.masked, nnx.Optimizer(wrt=…), eqx.filter)"
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        raise TypeError(
            f"{name} is {leaf!r}, which is no array; make it one (jnp.asarray), or leave it out "
            + elsewhere
        )
    if str(leaf.dtype) not in FLOATING:
        raise TypeError(
            f"{name} of shape {tuple(leaf.shape)} has dtype {leaf.dtype}; parameters and gradients "
            f"are of a floating dtype, {', '.join(FLOATING)}; leave others out {elsewhere}"
        )


def check_leaves(tree: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Checks every leaf with `check_array`, and returns the shapes by path."""
    shapes = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = leaf_path(keys)
        check_array(leaf, f"leaf '{path}' of {name}")
        shapes[path] = tuple(leaf.shape)
    return shapes


def check_alike(tree: Any, other: Any, name: str, other_name: str) -> None:
    """Checks that two trees have the same structure, and arrays of the same shapes.

    Args:
        tree: Arrays.
        other: Arrays.
        name: What to call the first in error messages, such as `"the gradients"`.
        other_name: What to call the second.

    Raises:
        TypeError: If a leaf is no array of a floating dtype; the message names it.
        ValueError: If they differ; the message names the leaves.
    """
    shapes, others = check_leaves(tree, name), check_leaves(other, other_name)
    faults = [
        f"leaf '{path}' has shape {shapes[path]} in {name} and {others[path]} in {other_name}"
        for path in shapes.keys() & others.keys()
        if shapes[path] != others[path]
    ]
    faults += [f"leaf '{path}' is in {name} only" for path in shapes.keys() - others.keys()]
    faults += [f"leaf '{path}' is in {other_name} only" for path in others.keys() - shapes.keys()]
    if not faults and jax.tree.structure(tree) != jax.tree.structure(other):
        faults = [unlike_containers(tree, other, name, other_name)]
    if faults:
        raise ValueError(
            f"{name} and {other_name} do not fit each other: {'; '.join(sorted(faults))}; give "
            "both the same structure and shapes, as jax.grad does"
        )


def unlike_containers(tree: Any, other: Any, name: str, other_name: str) -> str:
    """Says where two trees hold alike leaves in unlike containers.

    Args:
        tree: A tree, or a prefix of one.
        other: A tree of another structure.
        name: What to call the first.
        other_name: What to call the second.

    Returns:
        Such as `"at 'a' the labels have a dict, the tree a list"`.
    """
    paths = [keys for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]

    def first(one: Any, two: Any, leaf: int, depth: int) -> str:
        data = one.node_data(), two.node_data()
        if data[0] is None:  # a leaf, or that of a prefix
            return ""
        if data[0] != data[1]:
            kinds = ["a leaf" if node is None else f"a {node[0].__name__}" for node in data]
            if kinds[0] == kinds[1]:
                kinds = [f"{kind} of {node[1]}" for kind, node in zip(kinds, data, strict=True)]
            path = leaf_path(paths[leaf][:depth]) if leaf < len(paths) else ""
            where = f"at '{path}'" if path else "at the top"
            return f"{where} {name} have {kinds[0]}, {other_name} {kinds[1]}"
        for child, partner in zip(one.children(), two.children(), strict=False):
            if found := first(child, partner, leaf, depth + 1):
                return found
            leaf += child.num_leaves
        return ""

    found = first(jax.tree.structure(tree), jax.tree.structure(other), 0, 0)
    return found or f"{name} and {other_name} have the same leaves in other containers"


def only_where(tree: Any, other: Any) -> Any:
    """Keeps of `other` what stands where `tree` has leaves; None stands for the rest.

    Args:
        tree: Arrays, with None where there is none.
        other: The same structure, perhaps with something else where `tree` has None.

    Returns:
        A tree of the structure of `tree`, unless the two do not fit at all.
    """

    def is_none(x: Any) -> bool:
        return x is None

    try:
        return jax.tree.map(lambda t, o: None if t is None else o, tree, other, is_leaf=is_none)
    except (ValueError, TypeError):  # check_alike says where they differ
        return other


def warn(message: str) -> None:
    """Warns at the line that called it, outside of this package and of those that it calls."""
    inside = ("scion_jax", "optax", "jax")
    level, frame = 0, inspect.currentframe()
    while frame and str(frame.f_globals.get("__name__")).partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level + 1)
