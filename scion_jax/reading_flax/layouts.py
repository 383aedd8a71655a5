"""What Flax's layers do with their kernels, as layouts; the same for NNX and Linen."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Literal

import jax
from jax.typing import DTypeLike

Shape = tuple[int, ...]
Start = Callable[[jax.Array, Shape, DTypeLike], jax.Array]
# Names of biases and gains.
GAIN = re.compile(r"bias|scale|gain|gamma|beta", re.IGNORECASE)
Kind = Literal["matrix", "embedding", "vector", "unknown"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a model.

    Attributes:
        paths: Its path, `/`-joined and without `params`, and those of its aliases.
        shape: Its shape.
        kind: What its layer uses it for.
        layout: One letter per axis, possibly with parts; empty if the kind is unknown.
        module: Name of the class of its layer.
        tied: Whether an embedding is also used as an output layer.
        start: How the model starts it, if that is known.
        starts_at_zero: Whether the model starts it at zero on purpose.
        problem: Why the kind is unknown, or what is in doubt.
    """

    paths: tuple[str, ...]
    shape: Shape
    kind: Kind
    layout: str
    module: str
    tied: bool = False
    start: Start | None = None
    starts_at_zero: bool = False
    problem: str = ""

    @property
    def path(self) -> str:
        """The path that is shown."""
        return self.paths[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is, or may be, a matrix."""
        return self.kind != "vector"

    @property
    def is_called_vector(self) -> bool:
        """Whether its name is that of a bias or a gain."""
        return GAIN.search(self.path.split("/")[-1]) is not None

    @property
    def title(self) -> str:
        """Names the leaf in messages."""
        return f"'{self.path}' {self.shape} of {self.module}"


def general(batch: int, inputs: int, outputs: int) -> str:
    """The kernel of a linear map over several axes (`DenseGeneral`, `LinearGeneral`)."""
    return "b" * batch + "i" * inputs + "o" * outputs


def convolution(rank: int, groups: int = 1, transpose_kernel: bool = False) -> str:
    """The kernel of a convolution.

    Args:
        rank: Its number of axes: the window's, input and output.
        groups: Number of groups of features, each of which is convolved on its own.
        transpose_kernel: Whether the output comes before the input.

    Returns:
        For example `"ssio[4]"`.
    """
    if transpose_kernel:
        return "s" * (rank - 2) + "oi"
    return "s" * (rank - 2) + fused("io", groups)


def fused(layout: str, parts: int) -> str:
    """Splits the last axis into equal parts: gates, or groups of a convolution."""
    return layout if parts == 1 else f"{layout}[{parts}]"


def einsum(equation: str) -> tuple[Kind, str, str]:
    """Reads the kernel of an `Einsum`, the second operand, off its equation.

    A letter that is contracted is `i`, one that is kept `o`, and one that is in inputs, kernel and
    result `b`. So is a kept letter that leads the result: `SBTNH` holds S results side by side,
    each with a matrix of its own.

    Args:
        equation: As `jnp.einsum` takes it, such as `"BTD,NDH->BTNH"`.

    Returns:
        Whether the kernel is a matrix or, without a kept letter, a vector; its layout; and that of
        the bias, which follows the result.

    Raises:
        ValueError: If the equation does not tell.
    """
    match = re.fullmatch(r"([\w.]*),([\w.]*)->([\w.]*)", equation.replace(" ", ""))
    if match is None:
        raise ValueError(f"the equation {equation!r} is not of the form 'inputs,kernel->result'")
    inputs, kernel, result = match.groups()
    if "." in kernel or len(set(kernel)) < len(kernel):
        raise ValueError(f"the kernel of {equation!r} has repeated or unnamed axes")
    if summed := [letter for letter in kernel if letter not in inputs + result]:
        raise ValueError(f"{equation!r} sums over {summed[0]!r}, which only the kernel has")
    shared = [letter for letter in kernel if letter in inputs and letter in result]
    kept = [letter for letter in kernel if letter not in inputs]
    contracted = [letter for letter in kernel if letter not in result]
    # Where the inputs come in: what stands before that are results side by side.
    of_inputs = [index for index, letter in enumerate(result) if letter not in kernel]
    leading = [letter for letter in result[: min(of_inputs, default=0)] if letter in kept]
    if leading and len(leading) == len(kept):
        if len(kept) > 1:
            raise ValueError(
                f"in {equation!r} all of {', '.join(kept)} lead the result: which of them are "
                "matrices of their own, and which are outputs?"
            )
        leading = []
    batch = shared + leading
    if not kept and not contracted:  # a gain
        batch = []
    roles = {letter: "b" if letter in batch else "o" for letter in kernel}
    bias = "".join(roles[letter] for letter in result if letter in kernel)
    if not kept:
        return "vector", "".join(roles[letter] for letter in kernel), bias
    roles |= dict.fromkeys(contracted, "i")
    if not contracted:
        raise ValueError(f"{equation!r} contracts no axis of the kernel: what is its input?")
    return "matrix", "".join(roles[letter] for letter in kernel), bias


def placements(inner: Sequence[int | None], shape: Shape) -> list[tuple[int, ...]]:
    """Finds where the axes of a stack can be, by sizes alone.

    Args:
        inner: Shape of one entry of the stack; None for a size that is not known.
        shape: Shape of the stack.

    Returns:
        Every choice of axes that leaves `inner`; `[()]` if there is no stack, `[]` if nothing fits.
    """
    extra = len(shape) - len(inner)
    if extra < 0:
        return []
    return [
        chosen
        for chosen in itertools.combinations(range(len(shape)), extra)
        if all(
            size in (None, actual)
            for size, actual in zip(inner, without(shape, chosen), strict=True)
        )
    ]


def without(shape: Shape, axes: Sequence[int]) -> Shape:
    """Leaves out some axes of a shape."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def stacked(layout: str, axes: Sequence[int], shape: Shape) -> str:
    """Adds the axes of a stack to a layout.

    Args:
        layout: Layout of one entry; empty for a scalar.
        axes: Where the stack's axes are in `shape`.
        shape: Shape of the stack.

    Returns:
        The layout of the stack.
    """
    letters = re.findall(r"[a-z](?:\[[^\]]*\])?", layout)
    for axis in axes:
        letters.insert(axis, "b")
    if not layout and shape:  # a layout needs an `o`: scalars are parts of one entry each
        letters[-1] = f"o[{shape[-1]}]"
    return "".join(letters) or "o"
