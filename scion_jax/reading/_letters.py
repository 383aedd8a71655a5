"""Letters: the role of each axis of a parameter, from the roles of the factors it falls into.

`i` is an input, `o` an output, `s` a window, `b` a stack of matrices, `g` the groups of a
convolution, `-` an axis that was summed over, and `!` a contradiction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from scion_jax.reading._views import Factor

Pairs = Iterable[tuple[Factor, str]]


def letters_of(pairs: Pairs, shape: Sequence[int]) -> tuple[list[str | None], tuple[int, ...]]:
    """Finds the letter of each axis, and into how many equal matrices it falls."""
    found: list[list[tuple[int, int, str]]] = [[] for _ in shape]
    for (axis, stride, size), role in pairs:
        found[axis].append((stride, size, role))
    letters: list[str | None] = [None] * len(shape)
    groups = [1] * len(shape)
    for axis, entries in enumerate(found):
        entries = [entry for entry in entries if entry[1] > 1] or entries
        roles = {role for _, _, role in entries}
        if len(roles) < 2:
            letters[axis] = entries[0][2] if entries else None
            continue
        entries.sort(reverse=True)  # outermost first
        inner = entries[-1][2]
        outer = [entry for entry in entries if entry[2] in "bg"]
        if roles == {"i", "s"}:
            letters[axis] = "i"
        elif inner in "io" and roles <= {"b", "g", inner} and entries[: len(outer)] == outer:
            letters[axis], groups[axis] = inner, math.prod([size for _, size, _ in outer])
        else:
            letters[axis] = "!"
    return letters, tuple(groups)


def complete(letters: list[str | None], shape: Sequence[int]) -> bool:
    """Completes the letters of a product with axes of size one; tells if it has both sides."""
    spare = [
        axis for axis, n in enumerate(shape) if n == 1 and (letters[axis] or "b") == "b"
    ]  # fmt: skip
    if "g" in letters and ("o" in letters or spare):  # each channel is a matrix of its own
        if "o" not in letters:
            letters[spare.pop()] = "o"
        letters[:] = ["b" if letter == "g" else letter for letter in letters]
    if spare and "i" in letters and not {"o", "g"} & set(letters):
        letters[spare[-1]] = "o"
    return bool({"i", "s"} & set(letters)) and bool({"o", "g"} & set(letters))
