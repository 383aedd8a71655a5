"""Which norm each parameter of a model gets: rules, last, embeddings, vectors, and the rest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scion_jax.labels import nearest
from scion_jax.norms import ColNorm, Norm
from scion_jax.norms.layout import candidates as candidates_of_shape
from scion_jax.norms.layout import parse_layout
from scion_jax.reading_flax.labels import FlaxLabels
from scion_jax.reading_flax.layouts import Leaf


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A pattern for paths, with the norm of the leaves that it finds."""

    pattern: re.Pattern[str]
    norm: Norm
    of_last: bool

    def finds(self, leaf: Leaf) -> bool:
        return any(self.pattern.search(path) for path in leaf.paths)

    def __str__(self) -> str:
        return f"{'last' if self.of_last else 'rules'}[{self.pattern.pattern!r}]"

    @property
    def name(self) -> str:
        """Begins its labels; quoted, so that no pattern is taken for another label."""
        return f"{'last ' if self.of_last else ''}{self.pattern.pattern!r}"


def choose(
    leaves: Sequence[Leaf],
    hidden: Norm,
    last: Mapping[str, Norm],
    rules: Mapping[str, Norm],
    vectors: Norm,
) -> tuple[dict[str, Norm], FlaxLabels]:
    """Gives every parameter its norm; see `flax_norms`.

    Args:
        leaves: The parameters.
        hidden: Norm of the matrices that no pattern finds.
        last: Patterns of output layers, with their norms.
        rules: Other patterns, which come first.
        vectors: Norm of the vectors that no pattern finds.

    Returns:
        The norms by label, and the labels.

    Raises:
        ValueError: If something remains open; the message says what to write.
    """
    patterns = [*_read(rules, of_last=False), *_read(last, of_last=True)]
    found = {leaf.path: _first(patterns, leaf, leaves) for leaf in leaves}
    _check_all_used(patterns, found.values(), leaves)
    _check_known(leaves, found)
    _check_tied(leaves, found)
    norms: dict[str, Norm] = {}
    labelled, starts = [], []
    for leaf in leaves:
        rule = found[leaf.path]
        name, norm = _norm(leaf, rule, hidden, vectors)
        parse_layout(norm.layout, leaf.shape, f"leaf '{leaf.path}'")
        label = f"{name} {norm.layout}"
        norms[label] = norm
        labelled += [(path, leaf.shape, label) for path in leaf.paths]
        if leaf.start is not None and (_is_vector(norm) or leaf.starts_at_zero):
            starts += [(path, leaf.start) for path in leaf.paths]
    return norms, FlaxLabels(tuple(labelled), tuple(starts))


def candidates(leaves: Sequence[Leaf], most: int = 8) -> str:
    """Lists what could be the output layer, the latest first."""
    matrices = [leaf for leaf in leaves if leaf.kind == "matrix" and "b" not in leaf.layout]
    tied = [leaf for leaf in leaves if leaf.kind == "embedding" and leaf.tied]
    names = [leaf.title for leaf in (*tied, *reversed(matrices))]
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read(patterns: Mapping[str, Norm], of_last: bool) -> list[_Rule]:
    name = "last" if of_last else "rules"
    if not isinstance(patterns, Mapping):
        raise TypeError(
            f"{name} maps patterns of paths to norms, such as {{'lm_head': Sign(3000.0)}}; got "
            f"{patterns!r}"
        )
    read = []
    for pattern, norm in patterns.items():
        if not (isinstance(pattern, str) and isinstance(norm, Norm)):
            raise TypeError(
                f"{name} maps patterns of paths to norms, such as {{'lm_head': Sign(3000.0)}}; got "
                f"{pattern!r}: {norm!r}"
            )
        try:
            read.append(_Rule(re.compile(pattern), norm, of_last))
        except re.error as error:
            raise ValueError(f"{name}[{pattern!r}]: not a regular expression ({error})") from error
    return read


def _first(patterns: Sequence[_Rule], leaf: Leaf, leaves: Sequence[Leaf]) -> _Rule | None:
    for rule in patterns:
        if rule.finds(leaf):
            others = (other for other in leaves if other.is_matrix)
            if leaf.is_matrix or not any(rule.finds(other) for other in others):
                return rule
    return None


def _check_all_used(
    patterns: Sequence[_Rule], found: Iterable[_Rule | None], leaves: Sequence[Leaf]
) -> None:
    used = {id(rule) for rule in found}
    leaves = sorted(leaves, key=lambda leaf: not leaf.is_matrix)  # nearer to what is meant
    for rule in patterns:
        if id(rule) in used:
            continue
        if taken := [leaf.path for leaf in leaves if rule.finds(leaf)]:
            raise ValueError(
                f"{rule} only finds leaves that patterns before it have found, such as "
                f"'{taken[0]}'; leave it out, or put it first"
            )
        paths = [path for leaf in leaves for path in leaf.paths]
        closest = nearest(rule.pattern.pattern, paths)
        hint = f"; the nearest is '{closest}'" if closest else ""
        raise ValueError(f"{rule} finds no parameter of the model{hint}")


def _check_known(leaves: Sequence[Leaf], found: Mapping[str, _Rule | None]) -> None:
    lines = []
    for leaf in leaves:
        rule = found[leaf.path]
        if leaf.kind == "unknown" and (rule is None or rule.norm.layout is None):
            norm = "BiasRMS" if leaf.is_called_vector else "Spectral"
            could = candidates_of_shape(leaf.shape, leaf.is_called_vector)
            why = f" ({leaf.problem})" if leaf.problem else ""
            pattern = f"^{re.escape(leaf.path)}$"
            lines.append(
                f"{leaf.title}{why}: {could}, as in rules={{{pattern!r}: {norm}(layout='…'), …}}"
            )
    if lines:
        raise ValueError(
            "Flax's own layers do not tell what the axes of these parameters are; give each a "
            "rule whose norm has a layout, one letter per axis (i input, o output, s window, "
            "b batch):\n  " + "\n  ".join(lines)
        )


def _check_tied(leaves: Sequence[Leaf], found: Mapping[str, _Rule | None]) -> None:
    lines = []
    for leaf in leaves:
        if leaf.kind == "embedding" and leaf.tied and found[leaf.path] is None:
            also = f" (also '{leaf.paths[1]}')" if len(leaf.paths) > 1 else ""
            lines.append(
                f"{leaf.title}{also}: if it is the output layer, write last={{'{leaf.path}': "
                f"Sign(radius)}}; if it is only looked up, rules={{'{leaf.path}': ColNorm()}}"
            )
    if lines:
        raise ValueError(
            "embeddings that are tied to another layer, or attended to, need a norm of their "
            "own:\n  " + "\n  ".join(lines)
        )


def _norm(leaf: Leaf, rule: _Rule | None, hidden: Norm, vectors: Norm) -> tuple[str, Norm]:
    """Returns the first word of the label, and the norm with its layout."""
    layout = leaf.layout
    if rule is None:
        if leaf.kind == "vector":
            return "vectors", _filled(vectors, layout)
        if leaf.kind == "embedding":
            return "embedding", ColNorm(layout=layout)
        return "hidden", _filled(hidden, layout)
    if rule.of_last and leaf.kind == "embedding":
        layout = layout.translate(str.maketrans("io", "oi"))
    norm = rule.norm if rule.norm.layout is not None else _filled(rule.norm, layout)
    return rule.name, norm


def _is_vector(norm: Norm) -> bool:
    return set(norm.layout or "").isdisjoint("is")


def _filled(norm: Norm, layout: str) -> Norm:
    return dataclasses.replace(norm, layout=layout)


def check_norm(name: str, norm: Any) -> None:
    """Checks a norm whose layouts are to come from the model.

    Args:
        name: Name of the argument.
        norm: The norm.

    Raises:
        TypeError: If it is none.
        ValueError: If it has a layout of its own.
    """
    if not isinstance(norm, Norm):
        raise TypeError(f"{name} is a Norm such as Spectral(50.0); got {norm!r}")
    if norm.layout is not None:
        raise ValueError(
            f"{name}={norm}: layouts come from the model, one per layer; leave layout out, or use "
            "rules for single leaves"
        )
