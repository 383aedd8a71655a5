"""What JAX called differently in versions that are still supported.

Each function says from which version on it is what `jax` itself offers: once that is the oldest
supported version, its callers can do without it.
"""

from __future__ import annotations

from typing import Any

import jax


def varying_axes(array: jax.Array) -> frozenset[str]:
    """Names the mapped axes over which an array varies, as its type says."""
    kind: Any = jax.typeof(array)
    if jax.__version_info__ < (0, 10, 0):
        return kind.vma
    return frozenset(kind.manual_axis_type.varying)


def all_gather(array: jax.Array, names: tuple[str, ...], *, to_same: bool) -> jax.Array:
    """Joins what the devices along mapped axes hold, along axis 0.

    Args:
        array: Each device's part.
        names: The mapped axes.
        to_same: Whether the type of the result is to say that it is the same on all devices.

    Returns:
        The whole.
    """
    if jax.__version_info__ < (0, 8, 2):
        lax: Any = jax.lax
        gather = lax.all_gather_invariant if to_same else lax.all_gather
        return gather(array, names, tiled=True)
    to = "invarying" if to_same else "varying"
    return jax.lax.all_gather(array, names, tiled=True, to=to)
