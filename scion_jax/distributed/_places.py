"""Places: who works on which matrices, of stacks that hold fewer than there are devices.

By default a stack's first matrix goes to the first device, and so on. What is left over gets zeros,
and every stack leaves the same devices idle. Stacks with fewer matrices than devices have places
instead: who has least to do gets the next matrix. Then all are sent, worked on, and sent back at
the same time, and a device does nothing for stacks of which it has none. 12 layers of Llama on 64
devices:

                         by default   by places
    24 gate and up          0–23         0–23
    12 down                 0–11        24–35
    24 query and output     0–23        36–59
    24 key and value        0–23        36–55, 60–63

It takes memory: a matrix of each stack at the same time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from scion_jax.distributed._stacks import unstacked

Places = tuple[int, ...]

# Bytes of a matrix from which a branch pays.
_SMALLEST = 2**20


def places(stacks: Sequence[jax.Array | jax.ShapeDtypeStruct], devices: int) -> list[Places]:
    """Finds places: those with the most work first, each matrix to who has least to do so far.

    Args:
        stacks: Arrays `(batch, rows, columns)` that may go to all of the devices.
        devices: How many there are.

    Returns:
        For each stack the device of each matrix, ascending; empty for those without places: if
        there are as many matrices as devices, if they are small, and all if nothing is gained.
    """
    works: dict[int, int] = {}
    for index, stack in enumerate(stacks):
        batch, (n, m) = stack.shape[0], sorted(stack.shape[1:])
        if batch < devices and n * m * stack.dtype.itemsize >= _SMALLEST:
            works[index] = n * n * (2 * m + n)  # of a step of Newton–Schulz
    loads = [0] * devices
    found: list[Places] = [()] * len(stacks)
    for index in sorted(works, key=lambda index: -works[index]):
        free = sorted(range(devices), key=loads.__getitem__)[: stacks[index].shape[0]]
        found[index] = tuple(sorted(free))
        for device in free:
            loads[device] += works[index]
    return found if max(loads) < sum(works.values()) else [()] * len(stacks)


def placed(stack: jax.Array, places: Places, devices: int) -> jax.Array:
    """Puts zeros between matrices, so that each gets to its place: `(devices, rows, columns)`."""
    zeros = jnp.zeros_like(jax.lax.slice_in_dim(stack, 0, 1))
    runs = _runs(places, devices)
    matrices = iter(unstacked(stack, [size for is_filled, size in runs if is_filled], 0))
    parts = [[next(matrices)] if is_filled else [zeros] * size for is_filled, size in runs]
    return jnp.concatenate(list(itertools.chain(*parts)))


def taken_back(stack: jax.Array, places: Places) -> jax.Array:
    """Undoes `placed`."""
    runs = _runs(places, stack.shape[0])
    parts = unstacked(stack, [size for _, size in runs], 0)
    return jnp.concatenate([p for p, (is_filled, _) in zip(parts, runs, strict=True) if is_filled])


def _runs(places: Places, devices: int) -> list[tuple[bool, int]]:
    """Lists whether devices have a matrix, and for how many in a row that is so."""
    runs = itertools.groupby(device in places for device in range(devices))
    return [(is_filled, len(list(run))) for is_filled, run in runs]
