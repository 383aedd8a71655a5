"""Labels: which parameter is of which kind.

An optimizer takes one norm for everything, or a mapping `label → norm` together with labels for the
parameters, just as `optax.multi_transform` does: a tree of labels, a prefix of one, or a function
from the tree to either. `label_by_path` makes such a function from patterns. (`infer_norms` needs
no labels: an `Assignment` has them.)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from scion_jax._checks import unlike_containers
from scion_jax._paths import leaf_path, leaf_paths, without_collection


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
        leaves, labelled = leaf_paths(tree), leaf_paths(labels)
        missing = [path for path in leaves if not any(_begins(path, p) for p in labelled)]
        extra = [path for path in labelled if not any(_begins(p, path) for p in leaves)]
        faults = [f"leaf '{path}' has no label" for path in missing]
        faults += [f"the label at '{path}' has no leaf" for path in extra]
        faults += [] if faults else [unlike_containers(labels, tree, "the labels", "the tree")]
        raise ValueError(
            f"param_labels does not fit the tree: {'; '.join(faults)}; give it the tree's "
            "structure, or a prefix of it"
        ) from error
    return jax.tree.leaves(repeated)


def _is_function(param_labels: Any) -> bool:
    """Tells a function from a tree of labels, which may be callable, as Equinox's modules are."""
    leaves = jax.tree.leaves(param_labels)
    return callable(param_labels) and (not leaves or leaves[0] is param_labels)


def _begins(path: str, start: str) -> bool:
    return path == start or path.startswith(start + "/")
