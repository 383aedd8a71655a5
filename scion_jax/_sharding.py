"""Sharding in types: what to do when a mesh axis is `Explicit`.

On an Explicit mesh an array's type says how it is split, and contracting or merging a split axis
is an error unless the result's sharding is stated. The iteration needs whole matrices anyway, so
they are gathered first and split again afterwards. On an Auto mesh, or without one, the types say
nothing.

Inside of `shard_map` a type says over which mapped axes an array varies. What is to be summed over
all parameters must be summed over those axes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike


def replicate(array: jax.Array) -> jax.Array:
    """Gathers an array whose type says that it is split over Explicit mesh axes."""
    sharding = jax.typeof(array).sharding
    if all(axis is None for axis in sharding.spec):
        return array
    whole = NamedSharding(sharding.mesh, PartitionSpec(*(None,) * array.ndim))
    return jax.sharding.reshard(array, whole)


def shard_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Splits `array` as `like`, of the same shape and dtype, is split: as its type says.

    On an Auto mesh the compiler is told to treat both alike, by a choice among them that it
    simplifies away afterwards. Without `out_shardings` it might gather the result.
    """
    if not isinstance(like, jax.core.Tracer) and not isinstance(array, jax.core.Tracer):
        return place_like(array, like)
    sharding = jax.typeof(like).sharding
    if jax.sharding.get_abstract_mesh().auto_axes:
        return jnp.where(jnp.zeros_like(like, dtype=bool), like, array)
    if all(axis is None for axis in sharding.spec):
        return array
    return jax.sharding.reshard(array, sharding)


def place_like(array: jax.Array, like: Any) -> jax.Array:
    """Places `array` as `like` is placed: an array, or a shape that may say how it is split.

    Args:
        array: Any array, of which the devices hold no parts yet.
        like: An array, traced or not, or a shape, with a sharding on a mesh or on an abstract one.

    Returns:
        The same array. As it is where `like` says nothing, or an abstract mesh is not in force.
    """
    if isinstance(like, jax.core.Tracer):
        return shard_like(array, like)
    placement = getattr(like, "sharding", None)
    if placement is None or not getattr(like, "committed", True):
        return array
    if isinstance(array, jax.core.Tracer):
        return _constrain(array, placement) if isinstance(placement, NamedSharding) else array
    if isinstance(placement, NamedSharding) and isinstance(placement.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()
        if mesh.abstract_mesh.axis_names != placement.mesh.axis_names:
            return array
        placement = NamedSharding(mesh, placement.spec)
    return jax.device_put(array, placement)


def _constrain(array: jax.Array, placement: NamedSharding) -> jax.Array:
    """Splits a traced array: over Explicit axes by its type, over Auto axes by a constraint."""

    def along(names: Sequence[str]) -> NamedSharding:
        parts = [tuple(n for n in names_of(part) if n in names) for part in placement.spec]
        return NamedSharding(placement.mesh, PartitionSpec(*(part or None for part in parts)))

    explicit, auto = placement.mesh.explicit_axes, placement.mesh.auto_axes
    if explicit:
        array = jax.sharding.reshard(array, along(explicit))
    return jax.lax.with_sharding_constraint(array, along(auto)) if auto else array


def zeros_like(array: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Makes zeros that are split as `array` is, on an Auto mesh under `jit` too.

    There nothing but the use of `array` tells the compiler how to split them; the choice among
    `array` and 0 is simplified away once it has been told.
    """
    zeros = jnp.zeros_like(array, dtype=dtype)
    if not isinstance(array, jax.Array):  # a mere shape
        return zeros
    return jnp.where(jnp.zeros_like(array, dtype=bool), array.astype(zeros.dtype), zeros)


def varying(array: jax.Array) -> frozenset[str]:
    """Names the mapped axes over which an array varies; none outside of `shard_map`."""
    kind: Any = jax.typeof(array)
    if jax.__version_info__ < (0, 10, 0):
        return kind.vma
    return frozenset(kind.manual_axis_type.varying)


def placement(array: jax.Array) -> tuple[object, ...]:
    """Says what must be equal for arrays to be joined: how they are split, as far as is known."""
    held = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    return jax.typeof(array).sharding, varying(array), held


def gather_mapped(array: jax.Array, names: tuple[str, ...], shared: bool) -> jax.Array:
    """Joins what the devices along mapped axes hold, along axis 0.

    Args:
        array: Each device's part.
        names: The mapped axes.
        shared: Whether the type of the result is to say that it is the same on all devices.

    Returns:
        The whole.
    """
    if jax.__version_info__ < (0, 8, 2):
        lax: Any = jax.lax
        gather = lax.all_gather_invariant if shared else lax.all_gather
        return gather(array, names, tiled=True)
    to = "invarying" if shared else "varying"
    return jax.lax.all_gather(array, names, tiled=True, to=to)


def reduce_varying(reduce: Callable[..., jax.Array], numbers: jax.Array) -> jax.Array:
    """Reduces numbers over the mapped axes over which they vary.

    Args:
        reduce: `jax.lax.psum` or `jax.lax.pmax`.
        numbers: What each device has.

    Returns:
        The result, the same on all devices; numbers that do not vary as they are.
    """
    axes = varying(numbers)
    return reduce(numbers, tuple(sorted(axes))) if axes else numbers


def varying_alike(*lists: Sequence[jax.Array]) -> list[list[int]]:
    """Groups positions in lists of arrays by the mapped axes over which the arrays vary.

    Numbers of different groups must not be put into one array before they are reduced: it would
    vary over the axes of all.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for index, arrays in enumerate(zip(*lists, strict=True)):
        groups.setdefault(frozenset().union(*map(varying, arrays)), []).append(index)
    return list(groups.values())


def unsplit(array: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Makes some axes whole on every device, where types say that they are split.

    The devices split another axis instead if there is one that they divide evenly, so that nothing
    is held twice; the array is gathered otherwise.

    Args:
        array: Any array; on an Auto mesh, or without one, it is returned as it is.
        axes: The axes that must not be split.

    Returns:
        The same array.
    """
    sharding = jax.typeof(array).sharding
    spec = [names_of(part) for part in sharding.spec]
    moving = tuple(name for axis in axes for name in spec[axis])
    if not moving:
        return array
    for axis in axes:
        spec[axis] = ()
    for axis in range(array.ndim):
        devices = math.prod(sharding.mesh.shape[name] for name in (*spec[axis], *moving))
        if axis not in axes and array.shape[axis] % devices == 0 and array.shape[axis]:
            spec[axis] = (*spec[axis], *moving)
            break
    whole = NamedSharding(sharding.mesh, PartitionSpec(*(names or None for names in spec)))
    return jax.sharding.reshard(array, whole)


def reshape(array: jax.Array, shape: Sequence[int], origins: Sequence[int | None]) -> jax.Array:
    """Reshapes, and says how the result is split where types say how the array is.

    Args:
        array: Any array.
        shape: The new shape.
        origins: For each new axis, the old one over whose devices it is split, or None.

    Returns:
        The array in its new shape.
    """
    sharding = jax.typeof(array).sharding
    if all(axis is None for axis in sharding.spec):
        return array.reshape(shape)
    spec = PartitionSpec(*(None if axis is None else sharding.spec[axis] for axis in origins))
    return jax.lax.reshape(array, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def names_of(part: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of the mesh axes in a part of a `PartitionSpec`."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)
