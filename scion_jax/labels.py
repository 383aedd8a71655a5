"""Routing: which parameter gets which norm.

An optimizer takes one norm for everything, or a mapping `label → norm` together with labels for the
parameters, just as `optax.multi_transform` does: a tree of labels, a prefix of one, or a function
from the tree to either. `label_by_path` makes such a function from patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax

from scion_jax.norms import Norm

Norms = Norm | Mapping[Any, Norm]


def leaf_path(keys: Sequence[Any]) -> str:
    """Joins a JAX key path with `/`.

    Flax NNX wraps every array in a variable, whose attribute `value` ends the path; it is left
    out, so that one pattern serves NNX and Linen.

    Args:
        keys: A key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
        For example `"layers/0/kernel"`.
    """
    match keys:
        case (*_, jax.tree_util.DictKey(), jax.tree_util.GetAttrKey(name="value")):
            keys = keys[:-1]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def label_by_path(rules: Sequence[tuple[str, Hashable]]) -> Callable[[Any], Any]:
    """Labels every parameter by the first pattern that is found in its path.

    Args:
        rules: Pairs `(regular expression, label)`. The expression is searched for anywhere in the
            `/`-joined path of the leaf (`^` and `$` tie it to an end); the first match wins, so a
            last rule `(".*", label)` catches the rest.

    Returns:
        A function from a tree to the tree of its labels, for `param_labels`. Under
        `optax.inject_hyperparams`, list `"param_labels"` in `static_args`.

    Raises:
        TypeError: If a rule is not a pair of a string and a label.
        ValueError: If an expression does not compile; and, when the function is called, if a leaf
            matches no rule (the message names it).

    Example:
        >>> labels = label_by_path([("embed", "first"), ("kernel$", "hidden")])
        >>> labels({"embed": {"kernel": 0.0}, "dense": {"kernel": 0.0}})
        {'dense': {'kernel': 'hidden'}, 'embed': {'kernel': 'first'}}
    """
    compiled: list[tuple[re.Pattern[str], Hashable]] = []
    for rule in rules:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(f"a rule is a pair (regular expression, label); got {rule!r}")
        if not jax.tree_util.all_leaves([rule[1]]):
            raise TypeError(f"rule {rule!r}: a label is a string or a number, not a container")
        try:
            compiled.append((re.compile(rule[0]), rule[1]))
        except re.error as error:
            raise ValueError(f"rule {rule!r}: not a regular expression ({error})") from error

    def label(keys: Sequence[Any], leaf: Any) -> Hashable:
        del leaf
        path = leaf_path(keys)
        for pattern, name in compiled:
            if pattern.search(path):
                return name
        patterns = ", ".join(repr(pattern.pattern) for pattern, _ in compiled)
        raise ValueError(
            f"leaf '{path}' matches no rule of label_by_path ({patterns}); add a rule for it, or "
            "a last rule ('.*', label) for all that is left"
        )

    return lambda tree: jax.tree_util.tree_map_with_path(label, tree)


def check_norms(norms: Norms, param_labels: Any) -> None:
    """Checks, when an optimizer is built, that norms and labels belong together.

    Args:
        norms: One norm, or a mapping from labels to norms.
        param_labels: Labels of the parameters, or None.

    Raises:
        TypeError: If `norms` is neither a norm nor a mapping to norms.
        ValueError: If labels come without a mapping, or a mapping without labels.
    """
    if isinstance(norms, Norm):
        if param_labels is not None:
            raise ValueError(
                "param_labels needs norms to be a mapping {label: norm}; got the single norm "
                f"{norms}"
            )
        return
    if not isinstance(norms, Mapping):
        raise TypeError(f"norms is a Norm such as Spectral(50.0), or {{label: Norm}}; got {norms}")
    for label, norm in norms.items():
        if not isinstance(norm, Norm):
            raise TypeError(f"norms[{label!r}] must be a Norm such as Spectral(50.0); got {norm}")
    if param_labels is None:
        raise ValueError(
            "a mapping of norms needs param_labels: a tree or prefix of labels, or a function such "
            "as label_by_path([('kernel', 'hidden'), ('.*', 'rest')])"
        )


def labels_of(tree: Any, norms: Mapping[Hashable, Norm], param_labels: Any) -> Any:
    """Evaluates labels on a tree and checks that every one of them has a norm.

    Args:
        tree: Parameters or updates.
        norms: A mapping from labels to norms; labels that no leaf has are fine, because the tree
            may be masked by an outer transformation.
        param_labels: A tree or prefix of labels, or a function from `tree` to one.

    Returns:
        The tree or prefix of labels.

    Raises:
        ValueError: If a label has no norm; the message names the label and the leaf.
    """
    labels = param_labels(tree) if callable(param_labels) else param_labels
    for keys, label in jax.tree_util.tree_leaves_with_path(labels):
        if label not in norms:
            known = ", ".join(repr(name) for name in norms)
            raise ValueError(
                f"leaf '{leaf_path(keys)}' has the label {label!r}, but norms has no entry for it "
                f"(it has {known}); add one, or change the label"
            )
    return labels


def norms_of(tree: Any, norms: Norms, param_labels: Any) -> Any:
    """Finds the norm of every leaf.

    Args:
        tree: Parameters, gradients, or their shapes.
        norms: One norm, or a mapping from labels to norms.
        param_labels: Labels, as for the optimizers; None with a single norm.

    Returns:
        A tree like `tree`, with a norm at every leaf.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If a leaf does not fit its norm's layout, or norms and labels do not belong
            together; the message names the leaf.
    """
    check_norms(norms, param_labels)
    if isinstance(norms, Norm):
        chosen = jax.tree.map(lambda _: norms, tree)
    else:
        labels = labels_of(tree, norms, param_labels)
        chosen = jax.tree.map(
            lambda label, subtree: jax.tree.map(lambda _: norms[label], subtree), labels, tree
        )
    check_leaves(tree, chosen)
    return chosen


def check_leaves(tree: Any, norms: Any) -> None:
    """Checks that every leaf fits its norm.

    Args:
        tree: Parameters, updates, or their shapes.
        norms: A tree like it, of norms.

    Raises:
        TypeError: If a leaf is not floating; the message names it.
        ValueError: If a leaf does not fit its norm's layout; the message names it.
    """
    jax.tree_util.tree_map_with_path(
        lambda keys, leaf, norm: norm.check(leaf, leaf_path(keys)), tree, norms
    )
