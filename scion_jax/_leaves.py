"""Parameters, norms and labels become leaves whose norm and axes are known.

Optimizers, transforms, `init_params`, the diagnostics and `describe` all start here, so that none
reads a parameter in another way than the rest. Whatever does not fit is refused here, with the
leaf's path and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax

from scion_jax._assignment import Assignment, Labels
from scion_jax._checks import check_array
from scion_jax._labels import PathLabels, labels_of
from scion_jax._paths import kind_of_vector, leaf_path, leaf_paths, nearest, without_collection
from scion_jax.norms import Auto, BiasRMS, Leaf, Norm, at_rank, possible_layouts

Norms = Norm | Auto | Mapping[Any, Norm | Auto] | Assignment


def check_norms(norms: Norms, param_labels: Any) -> None:
    """Checks, when an optimizer is built, that norms and labels belong together.

    Args:
        norms: One norm, a mapping from labels to norms, or an assignment.
        param_labels: Labels of the parameters, with a mapping.

    Raises:
        TypeError: If `norms` is none of these.
        ValueError: If labels come without a mapping, or a mapping without labels.
    """
    if isinstance(norms, Mapping):
        for label, norm in norms.items():
            if not isinstance(norm, Norm):
                raise TypeError(
                    f"norms[{label!r}] must be a Norm such as Spectral(50.0); got {norm}"
                )
        if param_labels is None:
            raise ValueError(
                "a mapping of norms needs param_labels: a tree or prefix of labels, or a function "
                "such as label_by_path([('kernel', 'hidden'), ('.*', 'rest')])"
            )
    elif not isinstance(norms, Norm | Assignment):
        raise TypeError(
            "norms is a Norm such as Spectral(50.0), {label: Norm}, or what infer_norms returns; "
            f"got {norms}"
        )
    elif param_labels is not None:
        what = "an Assignment, which has its own" if isinstance(norms, Assignment) else norms
        raise ValueError(f"param_labels needs norms to be a mapping {{label: norm}}; got {what}")


def read_leaves(tree: Any, norms: Norms, param_labels: Any = None) -> list[Leaf]:
    """Finds the norm and the axes of every leaf.

    Args:
        tree: Parameters, gradients, or their shapes.
        norms: One norm, a mapping from labels to norms, or an assignment.
        param_labels: Labels, as for the optimizers; None with a single norm.

    Returns:
        The leaves, in the tree's order, `Auto` turned into the norm that it stands for.

    Raises:
        TypeError: If a leaf is no array of a floating dtype.
        ValueError: If a leaf does not fit its norm's layout, or needs one (all such leaves are
            named), or if norms and labels do not belong together.
    """
    check_norms(norms, param_labels)
    leaves: list[Leaf] = []
    unread: list[str] = []
    chosen = labelled_norms(tree, norms, param_labels)
    arrays = jax.tree_util.tree_leaves_with_path(tree)
    for (keys, array), (_, norm) in zip(arrays, chosen, strict=True):
        path = leaf_path(keys)
        check_array(array, f"leaf '{path}'")
        shape = tuple(array.shape)
        concrete = at_rank(norm, len(shape))
        if concrete.layout is None and not _has_default(concrete, path, len(shape)):
            unread.append(_what_to_write(path, shape, concrete))
        else:
            leaves.append(Leaf(path, concrete, concrete.read(shape, f"leaf '{path}'")))
    if unread:
        raise ValueError(
            "no axis is guessed at these leaves; give each a norm with a layout, one letter per "
            "axis (i input, o output, s window, b batch):\n  "
            + "\n  ".join(unread)
            + "\ninfer_norms(loss_fn, params, *batch) reads layouts off the program."
        )
    return leaves


def labelled_norms(
    tree: Any, norms: Norms, param_labels: Any
) -> list[tuple[Hashable, Norm | Auto]]:
    """Finds the label of every leaf, and the norm that was given for it.

    Args:
        tree: Parameters, gradients, or their shapes.
        norms: One norm, a mapping from labels to norms, or an assignment.
        param_labels: Labels; None with a single norm.

    Returns:
        Pairs of label (None with a single norm) and norm, in the order of the tree's leaves.

    Raises:
        ValueError: If a label has no norm; the message names the label and the leaf.
    """
    if isinstance(norms, Assignment):
        return labelled_norms(tree, norms.norms, norms.labels)
    if not isinstance(norms, Mapping):
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


def all_norms(norms: Norms) -> Iterable[Norm | Auto]:
    """Lists the norms that any leaf may get."""
    if isinstance(norms, Assignment):
        return norms.norms.values()
    return [norms] if isinstance(norms, Norm | Auto) else norms.values()


def unused(tree: Any, norms: Norms, param_labels: Any) -> list[str]:
    """Says which norms and rules of a hand-written mapping no leaf of a tree uses.

    Args:
        tree: Parameters, or their shapes.
        norms: One norm, a mapping from labels to norms, or an assignment.
        param_labels: Labels; None with a single norm.

    Returns:
        A sentence for each. None with an assignment, or labels that were read off a model: a tree
        may be a part of what was read.
    """
    if isinstance(norms, Norm | Auto | Assignment) or isinstance(param_labels, Labels):
        return []
    paths = leaf_paths(tree)
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


def _hint(text: str, paths: Sequence[str]) -> str:
    path = nearest(text, [without_collection(path) for path in paths])
    if path:
        return f"; the nearest path is '{path}'"
    return "" if paths else "; the tree has no leaves"


def _has_default(norm: Norm, path: str, rank: int) -> bool:
    """Tells whether a norm knows the layout of a rank, or knows why it has none."""
    if rank > 1 and kind_of_vector(path):
        return False
    return rank in norm.default_layouts or rank < min(norm.default_layouts)


def _what_to_write(path: str, shape: tuple[int, ...], norm: Norm) -> str:
    path, start = without_collection(path), f"'{path}' of shape {shape}"
    vector = kind_of_vector(path) is not None or isinstance(norm, BiasRMS)
    kind = "BiasRMS" if vector else type(norm).__name__
    label = re.sub(r"\W+", "_", path) or "weights"
    return (
        f"{start}: {possible_layouts(len(shape), vector)}, as in label_by_path("
        f'[("^{re.escape(path)}$", "{label}"), …]) and norms = {{"{label}": {kind}(layout="…"), …}}'
    )
