"""A table that shows how every parameter was read, to look at before training."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax

from scion_jax._assignment import Assignment
from scion_jax._leaves import Norms, labelled_norms, read_leaves, unused
from scion_jax._numerics import is_number
from scion_jax.norms import Auto, Axes, Leaf

_HEADER = (
    *("path", "shape", "label", "norm", "layout", "d_in → d_out", "radius", "step RMS"),
    "read at",
)


class Row(NamedTuple):
    """How one parameter was read.

    Attributes:
        path: Where it stands in its tree.
        shape: Its shape.
        label: Its label; None with a single norm.
        norm: Name of its norm.
        layout: Its layout.
        matrices: What it holds, such as `"12 × (768 → 3072)"`: fan-in to fan-out.
        radius: Radius of its ball.
        step_rms: Root mean square of the entries of `lmo`, what a step of learning rate 1 changes;
            NaN where the norm does not know it.
        read_at: Where the program uses it, such as `"dot_general model.py:41"`; empty unless the
            norms were read off a program.
    """

    path: str
    shape: tuple[int, ...]
    label: Hashable
    norm: str
    layout: str
    matrices: str
    radius: Any
    step_rms: float
    read_at: str = ""


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` returns; prints as a table.

    Attributes:
        rows: One for each parameter, in the tree's order.
        unused: A sentence for each norm or rule that no parameter uses, and for each parameter that
            no gradient reaches.
        fold: Whether equal blocks are printed as one.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...]
    fold: bool = True

    def __str__(self) -> str:
        rows = _folded(self.rows) if self.fold else self.rows
        lines = [_HEADER, *map(_cells, rows)]
        if not any(row.read_at for row in rows):
            lines = [line[:-1] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([texts[0], "─" * max(map(len, texts)), *texts[1:], *self.unused])

    __repr__ = __str__


def describe(
    params: Any, norms: Norms = Auto(), param_labels: Any = None, *, fold: bool = True
) -> Description:
    """Shows how every parameter is read: norm, layout, fan-in and fan-out, radius, step.

    Args:
        params: Parameters, or their `jax.ShapeDtypeStruct`s; nothing is computed.
        norms: As given to the optimizer.
        param_labels: As given to the optimizer.
        fold: Whether to print parameters that differ only in a number of their path as one line,
            `blocks/0…11/kernel`.

    Returns:
        A table to print, whose rows, one for each parameter, can be read by programs as well. With
        an `Assignment` it says where the program uses each, and which it does not use.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If norms and labels do not fit the parameters; the message names the leaves.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> params = {"bias": jnp.zeros(64), "kernel": jnp.zeros((16, 64))}
        >>> describe(params, scion_jax.Auto(radius=2.0))
        path    shape     label  norm      layout  d_in → d_out  radius  step RMS
        ─────────────────────────────────────────────────────────────────────────
        bias    (64,)            BiasRMS   o       64            1       1
        kernel  (16, 64)         Spectral  io      16 → 64       2       0.5
    """
    leaves = read_leaves(params, norms, param_labels)
    labels = [label for label, _ in labelled_norms(params, norms, param_labels)]
    rows = [_row(leaf, label) for leaf, label in zip(leaves, labels, strict=True)]
    idle = []
    if isinstance(norms, Assignment):
        entries = jax.tree.leaves(norms.map(lambda entry: entry, params))
        at = [", ".join(entry.used_at) for entry in entries]
        rows = [row._replace(read_at=text) for row, text in zip(rows, at, strict=True)]
        idle = [row for row, entry in zip(rows, entries, strict=True) if entry.is_unused]
    sentences = unused(params, norms, param_labels)
    sentences += [
        f"{row.path}: no gradient reaches it" for row in (_folded(idle) if fold else idle)
    ]
    return Description(tuple(rows), tuple(sentences), fold)


def _folded(rows: Sequence[Row]) -> list[Row]:
    """Joins rows that differ in one number of their paths, and then rows of the same numbers."""
    split = [(re.split(r"(\d+)", row.path), row) for row in rows]
    # From the last number to the first, so that inner stacks are joined before outer ones.
    for place in range(max((len(parts) for parts, _ in split), default=0) - 2, 0, -2):
        groups: dict[Hashable, list[tuple[list[str], Row]]] = {}
        for parts, row in split:
            others = (*parts[:place], None, *parts[place + 1 :])
            groups.setdefault((others, _cells(row)[1:]), []).append((parts, row))
        split = []
        for group in groups.values():
            parts, row = group[0]
            numbers = [other[place] for other, _ in group if place < len(other)]
            if len(group) > 1:
                parts = [*parts[:place], _runs(numbers), *parts[place + 1 :]]
            split.append((parts, row))
    return [row._replace(path="".join(parts)) for parts, row in split]


def _runs(numbers: Sequence[str]) -> str:
    """Writes 0, 1, 2, 5 as `0…2,5`."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}…{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _row(leaf: Leaf, label: Hashable) -> Row:
    path, norm, layout = leaf
    kinds = collections.Counter(_fans(axes) for axes in layout.blocks)
    counts = {text: 0 for text, _ in kinds}
    for (text, count), blocks in kinds.items():
        counts[text] += count * blocks
    matrices = ", ".join(
        text if count == 1 else f"{count} × ({text})" for text, count in counts.items()
    )
    sizes = [math.prod(axes.shape) for axes in layout.blocks]
    squares = [norm.unit_step_rms(axes) ** 2 for axes in layout.blocks]
    mean = sum(n * s for n, s in zip(sizes, squares, strict=True)) / max(sum(sizes), 1)
    radius = norm.radius
    step = math.sqrt(mean) * float(radius) if is_number(radius) else math.nan
    name = type(norm).__name__
    return Row(path, layout.shape, label, name, layout.text, matrices, radius, step)


def _fans(axes: Axes) -> tuple[str, int]:
    """Writes `d_in → d_out` of the matrices of a block, and counts them."""
    window = f"{axes.window_size}·" if axes.window else ""
    inputs = f"{window}{axes.d_in} → " if axes.columns else ""
    return f"{inputs}{axes.d_out}", axes.count


def _cells(row: Row) -> tuple[str, ...]:
    label = "" if row.label is None else str(row.label)
    radius = f"{float(row.radius):g}" if is_number(row.radius) else str(row.radius)
    step = "–" if math.isnan(row.step_rms) else f"{row.step_rms:.3g}"
    texts = (row.path, str(row.shape), label, row.norm, row.layout, row.matrices, radius, step)
    return *texts, row.read_at
