"""Labels: which parameter is of which kind.

An optimizer takes one norm for everything, or a mapping `label → norm` together with labels for the
parameters, just as `optax.multi_transform` does: a tree of labels, a prefix of one, or a function
from the tree to either. `label_by_path` makes such a function from patterns. (`infer_norms` needs
no labels: an `Assignment` has them.)
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp


def leaf_path(keys: Sequence[Any]) -> str:
    """Joins a JAX key path with `/`.

    Flax wraps arrays in variables and boxes, whose attribute `value` is left out, so that a state,
    a module and plain arrays have the same paths.

    Args:
        keys: A key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
        For example `"layers/0/kernel"`.
    """
    keys = tuple(keys)
    attributes = [i for i, key in enumerate(keys) if isinstance(key, jax.tree_util.GetAttrKey)]
    # The last attribute only, behind which a variable may hold containers of arrays: a layer that
    # is called `value`, as attention's, has attributes of its own.
    last = attributes[-1] if attributes else 0
    if last and keys[last] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:last] + keys[last + 1 :]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def without_collection(path: str) -> str:
    """Drops the `params/` that Linen's variables begin with, so that `^head` finds the head."""
    return path.removeprefix("params/")


# What biases and gains are called: of one layer, `o`; of rank 2 and more stacks, or of several
# axes, never `io`. Single letters are Haiku's and those of plain JAX, `D` and `A_log` Mamba's.
_VECTOR = re.compile(
    r"""
    (?P<shift> (?i: (^|_)(bias|beta|offset)(es|s)? (_|\d|$) ) | ^b(_?([a-z]|\d+))?$ )
    | (?i: (^|_)(scale|gain|gamma)s? (_|\d|$) ) | ^g(_?\d+)?$ | ^D$ | ^A_log$
    """,
    re.VERBOSE,
)


def kind_of_vector(path: str) -> Literal["shift", "gain"] | None:
    """Tells by a leaf's name whether it is a vector, and of which kind.

    Args:
        path: Its path. The name is the last component that is no number.

    Returns:
        `"shift"` for biases, which start at zero in every framework; `"gain"` for what may not;
        None for what may be a matrix.

    Example:
        >>> [kind_of_vector(path) for path in ("linear/b", "norm/scale", "lora_b", "weight")]
        ['shift', 'gain', None, None]
    """
    names = [name for name in path.split("/") if not name.isdecimal()]
    match = _VECTOR.search(names[-1]) if names else None
    if match is None:
        return None
    return "gain" if match["shift"] is None else "shift"


def check_no_count(tree: Any, name: str) -> None:
    """Raises `TypeError` if `optax.inject_hyperparams` takes a function of labels for a schedule.

    Args:
        tree: What the function is called with.
        name: What the function is.
    """
    if getattr(tree, "shape", None) == () and jnp.issubdtype(tree.dtype, jnp.integer):
        raise TypeError(
            f"{name} label trees of parameters, and leaf '' is a count, as schedules get it; under "
            "optax.inject_hyperparams list the argument in static_args, such as "
            'static_args=("norms", "param_labels")'
        )


@dataclasses.dataclass(frozen=True)
class PathLabels:
    """What `label_by_path` returns: a function from a tree to the tree of its labels.

    Attributes:
        rules: Pairs of a compiled pattern and a label.
    """

    rules: tuple[tuple[re.Pattern[str], Hashable], ...]

    def __call__(self, tree: Any) -> Any:
        """Labels every leaf; raises `ValueError` for one that no rule matches."""
        check_no_count(tree, "the rules of label_by_path")
        return jax.tree_util.tree_map_with_path(lambda keys, _: self._label(leaf_path(keys)), tree)

    def unused(self, paths: Iterable[str]) -> list[tuple[str, Hashable]]:
        """Lists the rules that are the first match of none of some paths."""
        used = {self._first(path) for path in paths}
        rules = enumerate(self.rules)
        return [(pattern.pattern, label) for i, (pattern, label) in rules if i not in used]

    def _first(self, path: str) -> int | None:
        for index, (pattern, _) in enumerate(self.rules):
            if pattern.search(path) or pattern.search(without_collection(path)):
                return index
        return None

    def _label(self, path: str) -> Hashable:
        first = self._first(path)
        if first is None:
            patterns = ", ".join(repr(pattern.pattern) for pattern, _ in self.rules)
            raise ValueError(
                f"leaf '{path}' matches no rule of label_by_path ({patterns}); add a rule for it, "
                "or a last rule ('.*', label) for all that is left"
            )
        return self.rules[first][1]


def label_by_path(rules: Sequence[tuple[str, Hashable]]) -> PathLabels:
    """Labels every parameter by the first pattern that is found in its path.

    Args:
        rules: Pairs `(regular expression, label)`. The expression is searched for anywhere in the
            `/`-joined path of the leaf (`^` and `$` tie it to an end); the first match wins, so a
            last rule `(".*", label)` catches the rest. The `params/` in front of Linen's paths may
            be left out.

    Returns:
        A hashable function from a tree to the tree of its labels, for `param_labels`. Under
        `optax.inject_hyperparams`, list `"param_labels"` in `static_args`. An optimizer warns, at
        `init`, of a rule that no leaf uses.

    Raises:
        TypeError: If `rules` is not a sequence of pairs of a string and a label.
        ValueError: If an expression cannot be compiled; when called, if a leaf matches no rule.

    Example:
        >>> labels = label_by_path([("^embed", "first"), (".*", "hidden")])
        >>> labels({"embed": {"embedding": 0.0}, "dense": {"kernel": 0.0}})
        {'dense': {'kernel': 'hidden'}, 'embed': {'embedding': 'first'}}
    """
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(
            "rules are a list of pairs (regular expression, label), in the order in which they are "
            f"tried; got {rules!r}"
        )
    compiled: list[tuple[re.Pattern[str], Hashable]] = []
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(f"a rule is a pair (regular expression, label); got {rule!r}")
        pattern, label = rule
        if not jax.tree_util.all_leaves([label]) or not isinstance(label, Hashable):
            raise TypeError(f"rule {rule!r}: a label is a string or a number, not a container")
        try:
            compiled.append((re.compile(pattern), label))
        except re.error as error:
            raise ValueError(f"rule {rule!r}: not a regular expression ({error})") from error
    return PathLabels(tuple(compiled))


def labels_of(tree: Any, param_labels: Any) -> list[Hashable]:
    """Finds the label of every leaf.

    Args:
        tree: Parameters, updates, or their shapes.
        param_labels: A tree or prefix of labels, or a function from `tree` to one.

    Returns:
        The labels, in the order of the tree's leaves.

    Raises:
        TypeError: If the function cannot be called with the tree.
        ValueError: If a leaf has no label, or a label no leaf; the message names them.
    """
    try:
        labels = param_labels(tree) if _is_function(param_labels) else param_labels
    except TypeError as error:
        raise TypeError(
            "param_labels is a tree of labels, or a function from the tree of parameters to one; "
            f"calling it with the parameters failed ({error})"
        ) from error
    try:
        repeated = jax.tree.map(
            lambda label, part: [label] * len(jax.tree.leaves(part)), labels, tree
        )
    except (ValueError, TypeError) as error:
        leaves, labelled = _paths(tree), _paths(labels)
        missing = [path for path in leaves if not any(_begins(path, p) for p in labelled)]
        extra = [path for path in labelled if not any(_begins(p, path) for p in leaves)]
        faults = [f"leaf '{path}' has no label" for path in missing]
        faults += [f"the label at '{path}' has no leaf" for path in extra]
        faults += [] if faults else [differing_containers(labels, tree, "the labels", "the tree")]
        raise ValueError(
            f"param_labels does not fit the tree: {'; '.join(faults)}; give it the tree's "
            "structure, or a prefix of it"
        ) from error
    return jax.tree.leaves(repeated)


def differing_containers(tree: Any, other: Any, name: str, other_name: str) -> str:
    """Says where two trees hold alike leaves in unlike containers.

    Args:
        tree: A tree, or a prefix of one.
        other: A tree of another structure.
        name: What to call the first.
        other_name: What to call the second.

    Returns:
        A sentence, such as `"at 'a' the labels have a dict, the tree a list"`.
    """
    paths = [keys for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]

    def first(one: Any, two: Any, leaf: int, depth: int) -> str:
        data = one.node_data(), two.node_data()
        if data[0] is None:  # a leaf, or that of a prefix
            return ""
        if data[0] != data[1]:
            path = leaf_path(paths[leaf][:depth]) if leaf < len(paths) else ""
            kinds = ["a leaf" if node is None else f"a {node[0].__name__}" for node in data]
            if kinds[0] == kinds[1]:
                kinds = [f"{kind} of {node[1]}" for kind, node in zip(kinds, data, strict=True)]
            where = f"at '{path}'" if path else "at the top"
            return f"{where} {name} have {kinds[0]}, {other_name} {kinds[1]}"
        for child, partner in zip(one.children(), two.children(), strict=False):
            if found := first(child, partner, leaf, depth + 1):
                return found
            leaf += child.num_leaves
        return ""

    found = first(jax.tree.structure(tree), jax.tree.structure(other), 0, 0)
    return found or f"{name} and {other_name} have the same leaves in other containers"


def nearest(text: str, choices: Iterable[str]) -> str | None:
    """Finds the path that looks most like a text, which may be a pattern, as a whole or in part.

    Args:
        text: A path, a pattern or a label.
        choices: Paths.

    Returns:
        One of them; None if nothing in them looks like the text.
    """
    letters = re.sub(r"[\^$.*+?()\[\]|\\]", "", text)
    path_of: dict[str, str] = {}
    for path in choices:
        for part in (path, *path.split("/")):
            path_of.setdefault(part, path)
    found = difflib.get_close_matches(letters, path_of, n=1)
    return path_of[found[0]] if found else None


def _is_function(param_labels: Any) -> bool:
    """Tells a function from a tree of labels, which may be callable, as Equinox's modules are."""
    leaves = jax.tree.leaves(param_labels)
    return callable(param_labels) and (not leaves or leaves[0] is param_labels)


def _paths(tree: Any) -> list[str]:
    return [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _begins(path: str, start: str) -> bool:
    return path == start or path.startswith(start + "/")
