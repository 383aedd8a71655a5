"""Stacks: arrays of one kind, from however many leaves, joined along their batch axis.

The graph then grows with the number of kinds instead of the number of layers, and a device sees few
large products instead of many small ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp

from scion_jax._numerics import hidden


class Stacks:
    """Arrays joined along their batch axis, one stack for each kind, and the way back.

    Attributes:
        groups: For each stack the positions of its members.
        joined: The stacks.
    """

    def __init__(
        self, arrays: Sequence[jax.Array], kinds: Sequence[Hashable], axis: int = 0
    ) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(index)
        self.groups = list(groups.values())
        self.joined = [jnp.concatenate([arrays[i] for i in group], axis) for group in self.groups]
        self._axis = axis
        self._sizes = [array.shape[axis] for array in arrays]

    def split(self, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Undoes the joining.

        Args:
            stacks: What became of `joined`, with the same sizes along the batch axis, or longer.

        Returns:
            One array for each member, in the order that the arrays were given in.
        """
        results: dict[int, jax.Array] = {}
        for group, stack in zip(self.groups, stacks, strict=True):
            pieces = unstacked(stack, [self._sizes[i] for i in group], self._axis)
            results.update(zip(group, pieces, strict=True))
        return [results[index] for index in range(len(results))]


def unstacked(stack: jax.Array, sizes: Sequence[int], axis: int) -> Sequence[jax.Array]:
    """Cuts pieces of given sizes off a stack, along an axis; what is left is left out."""
    rest = stack.shape[axis] - sum(sizes)
    if rest:
        return unstacked(stack, [*sizes, rest], axis)[:-1]
    if len(sizes) == 1:
        return [stack]
    return jax.lax.platform_dependent(
        stack,
        cpu=lambda stack: _dynamic_slices(stack, sizes, axis),
        default=lambda stack: jax.lax.split(stack, sizes, axis),
    )


def _dynamic_slices(stack: jax.Array, sizes: Sequence[int], axis: int) -> list[jax.Array]:
    """Cuts a stack into pieces, as XLA's backend for CPUs compiles it soonest.

    It makes one kernel for all pieces of one size if it does not know where they lie, and one for
    each (8 ms) if it does. Unsigned, so that no index is checked for sign.
    """
    places = hidden([jnp.uint32(sum(sizes[:index])) for index in range(len(sizes))])
    return [
        jax.lax.dynamic_slice_in_dim(stack, start, size, axis)
        for start, size in zip(places, sizes, strict=True)
    ]
