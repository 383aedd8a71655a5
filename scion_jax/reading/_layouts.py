"""Layouts: what the uses of a parameter agree on, as text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from scion_jax.reading._uses import MATRIX, VECTOR, WEAK, Use

Notes = dict[Use, set[tuple[Any, ...]]]  # what became of the results of uses


def layout_of(kind: str, uses: Sequence[Use], shape: Sequence[int], notes: Notes) -> str | None:
    """Finds the layout of a parameter; None where its uses disagree.

    Args:
        kind: What the parameter is.
        uses: The uses that say so.
        shape: Its shape.
        notes: What became of their results, for each use.
    """
    found = [_agreed(uses, axis, size) for axis, size in enumerate(shape)]
    if None in found:
        return None
    for axis, letter in enumerate(found):  # an ensemble's members, which lead
        leads = letter == "o" and "i" not in found[:axis] and "o" in found[axis + 1 :]
        if leads and any(("stack", axis) in notes[use] for use in uses):
            found[axis] = "b"
    letters: list[str] = []
    for letter in found:
        other = "o" if kind != MATRIX or "i" in found or "i" in letters else "i"
        letters.append("b" if letter == "b" else "o" if kind == VECTOR else letter or other)
    texts = [""] * len(shape)
    outermost = next((a for a, x in enumerate(letters) if x == "o" and shape[a] > 1), None)
    for axis, (letter, size) in enumerate(zip(letters, shape, strict=True)):
        if letter in "io" and size > 1:
            letters[axis], texts[axis] = _parts(uses, axis, size, letters, axis == outermost, notes)
    if shape and "o" not in letters:  # a stack of numbers, each on its own
        letters[-1], texts[-1] = "o", f"[{shape[-1]}]" if shape[-1] > 1 else ""
    return "".join(a + b for a, b in zip(letters, texts, strict=True)) or "o"


def _agreed(uses: Sequence[Use], axis: int, size: int) -> str | None:
    """Finds the letter of an axis; None where uses disagree, empty where none of them tells."""
    found = {use.letters[axis] for use in uses} - {None}
    if len(found) > 1 and size == 1:
        sides = found & {"i", "o"}
        found = sides if len(sides) == 1 else {"o"}
    if found == {"g"} or found == {"g", "o"}:
        found = {"o"}
    if found == {"b", "o"} and all(use.kind in (VECTOR, WEAK) for use in uses):
        found = {"b"}
    return None if len(found) > 1 else next(iter(found), "")


def _parts(
    uses: Sequence[Use],
    axis: int,
    size: int,
    letters: Sequence[str],
    is_outermost: bool,
    notes: Notes,
) -> tuple[str, str]:
    """Finds the parts of an axis, as text, and its letter: `b` if each entry is one."""
    letter = letters[axis]
    groups = [size if use.letters[axis] == "g" else use.groups[axis] for use in uses]
    if max(groups) > 1:
        return letter, f"[{groups[0]}]" if len(set(groups)) == 1 else ""
    spans = {use.spans[axis] for use in uses}
    heads = [{note[2] for note in notes[use] if note[:2] == ("head", axis)} for use in uses]
    if is_outermost:
        whole = [use for use in uses if ("whole",) in notes[use]]
        pieces = [note for use in uses if use not in whole for note in notes[use]]
        spans = {note[1][axis] for note in pieces if note[0] in ("used", "piece")} or spans
    is_table = axis == 0 and "o" in letters[1:] and all(use.kind != MATRIX for use in uses)
    if is_table and (0, size) not in spans:
        return "b", ""  # rows that are used apart
    apart = _heads(set().union(*heads), spans, size) if all(heads) else []
    sizes = apart or _tiles(spans, size)
    if set(sizes) == {1}:
        return ("b" if letters.count(letter) > 1 else letter), ""
    count = str(len(sizes)) if len(set(sizes)) == 1 else ",".join(map(str, sizes))
    return letter, f"[{count}]" if len(sizes) > 1 else ""


def _heads(heads: set[tuple[int, int]], spans: set[tuple[int, int]], size: int) -> list[int]:
    """Finds the sizes of heads, and of pieces that have none; nothing if they do not fit."""
    pieces = {
        (start, stop)
        for start, stop in spans
        if all(stop <= first or last <= start for first, last in heads)
    }
    tiles = _tiles(heads | pieces, size)
    ends = list(itertools.accumulate(tiles))
    return tiles if {*zip([0, *ends], ends, strict=False)} <= heads | pieces else []


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
