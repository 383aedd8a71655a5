"""Layouts: which axis of an array is fan-in, fan-out, spatial window or batch.

JAX frameworks disagree about the order of a weight's axes, and reading one the wrong way round
silently inverts the factor `√(d_out/d_in)` that most norms here contain. A layout states the order
with one letter per axis:

    `i`  input (fan-in); several are flattened in order
    `o`  output (fan-out); several are flattened in order
    `s`  spatial window of a convolution; `k` is the product of the `s` sizes
    `b`  batch: independent matrices (scanned layers, experts, heads kept apart)

An axis may hold several matrices side by side, and its letter says so: `io[3]` is three equal ones
(fused q, k, v), `io[768,256,256]` unequal ones (grouped-query attention), `ssio[groups]` a grouped
or depthwise convolution, `o[4]` the bias of four fused gates. Each is a matrix of its own, with its
own `d_out` or `d_in`.

Every array is thereby one or more *blocks*, and every block, once equal parts stand on an axis of
their own, a batch of matrices `(batch, d_out, k·d_in)`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from scion_jax import _sharding as sharding
from scion_jax.norms._axes import Axes

_ROLES = {"i": "input", "o": "output", "s": "spatial window", "b": "batch"}
_TERM = re.compile(r"([a-zA-Z])(?:\[([^\]]*)\])?")

# Flax's Dense and Embed. Every rank above occurs with several meanings, so no other is guessed.
DEFAULTS: Mapping[int, str] = {0: "o", 1: "o", 2: "io"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array is read: as blocks, each a batch of matrices of one shape.

    Attributes:
        text: The layout, such as `"io[3]"`.
        shape: Shape of the array.
        cuts: For each axis, the sizes of the blocks along it.
        blocks: The axes of each block, equal parts on axes of their own; ordered as the blocks lie.
    """

    text: str
    shape: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    blocks: tuple[Axes, ...]

    @property
    def is_vector(self) -> bool:
        """Whether there is no input axis: a bias or a gain, or a stack of them."""
        return not any(axes.columns for axes in self.blocks)

    def to_blocks(self, array: jax.Array) -> list[jax.Array]:
        """Cuts an array of shape `shape` into its blocks."""
        if [axes.shape for axes in self.blocks] == [self.shape]:
            return [array]
        parted = [a for a, letter in enumerate(_terms(self.text)) if letter[1]]
        # Devices may hold an axis in other pieces than its parts.
        pieces = [sharding.unsplit(array, parted)]
        for axis, sizes in enumerate(self.cuts):
            if len(sizes) > 1:
                ends = list(itertools.accumulate(sizes))[:-1]
                pieces = [part for piece in pieces for part in jnp.split(piece, ends, axis)]
        return [p.reshape(axes.shape) for p, axes in zip(pieces, self.blocks, strict=True)]

    def from_blocks(self, blocks: Sequence[jax.Array]) -> jax.Array:
        """Undoes `to_blocks`."""
        if [axes.shape for axes in self.blocks] == [self.shape]:
            return blocks[0]
        shapes = itertools.product(*self.cuts)
        pieces = [block.reshape(shape) for block, shape in zip(blocks, shapes, strict=True)]
        for axis, sizes in reversed(list(enumerate(self.cuts))):
            count = len(sizes)
            if count > 1:
                starts = range(0, len(pieces), count)
                pieces = [jnp.concatenate(pieces[s : s + count], axis) for s in starts]
        return pieces[0]


def check_layout(layout: str | None) -> None:
    """Checks what can be known about a layout before an array is seen.

    Args:
        layout: One letter of `i`, `o`, `s`, `b` per axis, `i` and `o` with their parts in brackets
            where there are several; or None for the default.

    Raises:
        TypeError: If `layout` is neither None nor a string.
        ValueError: If it holds another letter, malformed parts, or no `o`.
    """
    if not isinstance(layout, str | None):
        raise TypeError(f"a layout is a string such as 'io', or None; got {layout!r}")
    if layout is not None:
        _terms(layout)


@functools.cache
def _terms(layout: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Reads `"io[3]"` as `(("i", ()), ("o", (3,)))`."""
    terms, end = [], 0
    for match in _TERM.finditer(layout):
        if match.start() != end:
            break
        end = match.end()
        letter, parts = match.groups()
        if letter not in _ROLES:
            meanings = ", ".join(f"'{key}' ({value})" for key, value in _ROLES.items())
            raise ValueError(f"layout {layout!r} holds the letter {letter!r}; use {meanings}")
        sizes = () if parts is None else tuple(part.strip() for part in parts.split(","))
        if not all(size.isdecimal() and int(size) for size in sizes) or (sizes and letter in "sb"):
            raise ValueError(
                f"layout {layout!r}: 'i' and 'o' may be followed by a number of equal parts or by "
                f"the sizes of unequal ones, as in 'io[3]' or 'io[768,256,256]'; got "
                f"'{match.group()}'"
            )
        terms.append((letter, tuple(int(size) for size in sizes)))
    if end != len(layout):
        raise ValueError(
            f"layout {layout!r} cannot be read from {layout[end:]!r} on; write one letter of 'i', "
            "'o', 's', 'b' per axis, as in 'io', 'ssio' or 'io[3]'"
        )
    if not any(letter == "o" for letter, _ in terms):
        raise ValueError(f"layout {layout!r} has no output axis; mark at least one axis with 'o'")
    return tuple(terms)


def parse_layout(
    layout: str | None,
    shape: tuple[int, ...],
    name: str = "",
    defaults: Mapping[int, str] = DEFAULTS,
) -> Layout:
    """Reads a layout against the shape of an array.

    Args:
        layout: As in `check_layout`; None for the default of the rank, `o` for 0 and 1 and `io`
            for 2. A scalar counts as one output.
        shape: Shape of the array.
        name: What to call the array in error messages, such as `"leaf 'head/kernel'"`.
        defaults: The layout of each rank that has one.

    Returns:
        The array's blocks and their axes.

    Raises:
        ValueError: If the layout is malformed, does not fit the shape, or is None and the rank has
            no default.

    Example:
        >>> (axes,) = parse_layout("ssio", (3, 3, 16, 32)).blocks
        >>> axes.d_out, axes.d_in, axes.window_size
        (32, 16, 9)
        >>> query, key_and_value = parse_layout("io[64,16,16]", (64, 96)).blocks[:2]
        >>> query.d_out, key_and_value.d_out
        (64, 16)
    """
    array = f"{name or 'an array'} of shape {tuple(shape)}"
    if layout is None:
        if len(shape) not in defaults:
            vector = 2 not in defaults and 1 in defaults  # those of a vector's norm
            raise ValueError(
                f"{array} has no default layout; {possible_layouts(len(shape), vector)}"
            )
        layout = defaults[len(shape)]
    terms = _terms(layout)
    if not shape and layout == "o":
        return Layout("o", (), (), (Axes((), (), (), (), ()),))
    if len(terms) != len(shape):
        raise ValueError(
            f"layout {layout!r} has {len(terms)} letters, but {array} has rank {len(shape)}; give "
            "one letter per axis"
        )
    cuts, repeats = [], []
    for axis, ((letter, parts), size) in enumerate(zip(terms, shape, strict=True)):
        count = parts[0] if len(parts) == 1 else len(parts)
        equal = len(set(parts)) <= 1
        if len(parts) > 1 and sum(parts) != size:
            raise ValueError(
                f"layout {layout!r}: the parts {list(parts)} of axis {axis} ('{letter}') add up to "
                f"{sum(parts)}, but {array} has {size} there"
            )
        if count and size % count and equal:
            raise ValueError(
                f"layout {layout!r}: axis {axis} ('{letter}') of {array} has {size} entries, which "
                f"cannot be {count} equal parts"
            )
        cuts.append((size,) if equal else parts)
        repeats.append(max(count, 1) if size and equal else 1)
    letters = [letter for letter, _ in terms]
    blocks = tuple(_axes(letters, sizes, repeats) for sizes in itertools.product(*cuts))
    return Layout(layout, tuple(shape), tuple(cuts), blocks)


def _axes(letters: Sequence[str], sizes: Sequence[int], repeats: Sequence[int]) -> Axes:
    """Finds the axes of a block, with a batch axis in front of each that has equal parts."""
    roles, shape = "", []
    for letter, size, repeat in zip(letters, sizes, repeats, strict=True):
        roles += "b" * (repeat > 1) + letter
        shape += [repeat] * (repeat > 1) + [size // repeat]
    batch, output, inputs, window = (
        tuple(axis for axis, role in enumerate(roles) if role == wanted) for wanted in "bois"
    )
    return Axes(tuple(shape), batch, output, inputs, window)


_COMMON = {
    2: "'io' (Dense), 'oi' (PyTorch, Equinox)",
    3: "'sio' (Conv1d kernel), 'ioo' (attention q, k, v), 'iio' (attention output), 'oio' "
    "(projections of one head each), 'bio' (stacked layers, experts)",
    4: "'ssio' (Conv2d kernel), 'bioo' or 'biio' (stacked attention), 'boio' (heads apart), "
    "'bbio' (stacked experts), 'bsio' (stacked Conv1d), 'oiss' (PyTorch, Equinox)",
    5: "'sssio' (Conv3d kernel), 'bssio' (stacked Conv2d), 'bbioo' or 'bbiio' (attention in two "
    "stacks)",
}


def possible_layouts(rank: int, vector: bool = False) -> str:
    """Says what an array could be.

    Args:
        rank: Number of its axes.
        vector: Whether it is a bias or a gain, by its name or by its norm.

    Returns:
        The end of a sentence.
    """
    known = _COMMON.get(rank, "")
    if vector and rank > 1:
        known = f"'{'o' * rank}' (one bias or gain), 'b{'o' * (rank - 1)}' (a stack of them)"
    could = f"it could be {known}" if known else f"use {rank} letters of 'i', 'o', 's' and 'b'"
    return f"{could}; give its norm the layout"
