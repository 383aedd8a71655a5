"""Resolution: parameters, norms and labels become leaves whose norm and axes are known.

Optimizers, transforms, `init_params`, the diagnostics and `describe` all start here, so that none
reads a parameter in another way than the rest. Whatever does not fit is refused here, with the
leaf's path and what to write instead.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from scion_jax import numerics
from scion_jax.hyperparameters import level_of_the_caller
from scion_jax.labels import (
    ModelLabels,
    PathLabels,
    labels_of,
    leaf_path,
    nearest,
    without_collection,
)
from scion_jax.norms import Norm
from scion_jax.norms.layout import candidates
from scion_jax.norms.leaves import Leaf

Norms = Norm | Mapping[Any, Norm]

# Names of vectors. Of rank 2 and more they are stacks, or biases of several axes, never `io`.
_VECTOR = re.compile(r"(^|_)(bias|scale|gain|gamma|beta)(es|s)?(_|\d|$)", re.IGNORECASE)


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


def resolve(tree: Any, norms: Norms, param_labels: Any = None) -> list[Leaf]:
    """Finds the norm and the axes of every leaf.

    Args:
        tree: Parameters, gradients, or their shapes.
        norms: One norm, or a mapping from labels to norms.
        param_labels: Labels, as for the optimizers; None with a single norm.

    Returns:
        The leaves, in the tree's order, `Auto` turned into the norm that it stands for.

    Raises:
        TypeError: If a leaf is no array of a floating dtype.
        ValueError: If a leaf does not fit its norm's layout, or needs one (all such leaves are
            named), or if norms and labels do not belong together.
    """
    check_norms(norms, param_labels)
    chosen = labelled_norms(tree, norms, param_labels)
    leaves: list[Leaf] = []
    unread: list[str] = []
    for (keys, array), (_, norm) in zip(
        jax.tree_util.tree_leaves_with_path(tree), chosen, strict=True
    ):
        path = leaf_path(keys)
        name = f"leaf '{path}'"
        numerics.check_floating(array, name)
        shape = tuple(array.shape)
        concrete = norm.resolve(len(shape))
        vector = len(shape) > 1 and _VECTOR.search(path.rsplit("/", 1)[-1]) is not None
        known = len(shape) < 3 or len(shape) in concrete.default_layouts
        if concrete.layout is None and (vector or not known):
            unread.append(_what_to_write(path, shape, norm, vector))
        else:
            leaves.append(Leaf(path, concrete, concrete.read(shape, name)))
    if unread:
        raise ValueError(
            "no axis is guessed at these leaves; give each a norm with a layout, one letter per "
            "axis (i input, o output, s window, b batch):\n  "
            + "\n  ".join(unread)
            + "\nflax_norms(model, …) reads the layouts of a Flax model."
        )
    return leaves


def labelled_norms(tree: Any, norms: Norms, param_labels: Any) -> list[tuple[Hashable, Norm]]:
    """Finds the label of every leaf, and the norm that was given for it.

    Args:
        tree: Parameters, gradients, or their shapes.
        norms: One norm, or a mapping from labels to norms.
        param_labels: Labels; None with a single norm.

    Returns:
        Pairs of label (None with a single norm) and norm, in the order of the tree's leaves.

    Raises:
        ValueError: If a label has no norm; the message names the label and the leaf.
    """
    if isinstance(norms, Norm):
        return [(None, norms)] * len(jax.tree.leaves(tree))
    labels = labels_of(tree, param_labels)
    for (keys, _), label in zip(jax.tree_util.tree_leaves_with_path(tree), labels, strict=True):
        if not isinstance(label, Hashable) or label not in norms:
            known = ", ".join(repr(name) for name in norms)
            raise ValueError(
                f"leaf '{leaf_path(keys)}' has the label {label!r}, but norms has no entry for it "
                f"(it has {known}); add one, or change the label"
            )
    return [(label, norms[label]) for label in labels]


def unused(tree: Any, norms: Norms, param_labels: Any) -> list[str]:
    """Says which norms and rules of a hand-written mapping no leaf of a tree uses.

    Args:
        tree: Parameters, or their shapes.
        norms: One norm, or a mapping from labels to norms.
        param_labels: Labels; None with a single norm.

    Returns:
        A sentence for each. None with labels that were read off a model, of which a tree may be a
        part.
    """
    if isinstance(norms, Norm) or isinstance(param_labels, ModelLabels):
        return []
    paths = [leaf_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    used = set(labels_of(tree, param_labels))
    rules = param_labels.unused(paths) if isinstance(param_labels, PathLabels) else []
    sentences = [
        f"rule ({pattern!r}, {label!r}) of label_by_path is the first match of no leaf"
        + _hint(pattern, paths)
        for pattern, label in rules
    ]
    missing = {label for _, label in rules}
    for label in norms:
        if label not in used and label not in missing:
            sentences.append(f"norms[{label!r}] is used by no leaf" + _hint(str(label), paths))
    return sentences


def warn_of_unused(tree: Any, norms: Norms, param_labels: Any) -> None:
    """Warns of what `unused` finds: a misspelt pattern leaves its layers to another norm."""
    for sentence in unused(tree, norms, param_labels):
        warnings.warn(sentence, UserWarning, stacklevel=level_of_the_caller())


def _hint(text: str, paths: Sequence[str]) -> str:
    path = nearest(text, [without_collection(path) for path in paths])
    return f"; the nearest path is '{path}'" if path else "; the tree has no leaves"


def _what_to_write(path: str, shape: tuple[int, ...], norm: Norm, vector: bool) -> str:
    kind = "BiasRMS" if vector else type(norm).__name__
    kind = "Spectral" if kind == "Auto" else kind
    label = re.sub(r"\W+", "_", without_collection(path)) or "weights"
    letters = "b" * (len(shape) - 1) + "o" if vector else "…"
    return (
        f"'{path}' of shape {shape}: {candidates(len(shape), vector)}, as in "
        f'label_by_path([("^{re.escape(without_collection(path))}$", "{label}"), …]) and '
        f'norms = {{"{label}": {kind}(layout="{letters}"), …}}'
    )
