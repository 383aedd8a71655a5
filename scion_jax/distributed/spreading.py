"""Spreading: which device orthogonalizes which matrix, and what `shard_over` means.

An iteration on a matrix that is split over devices would communicate in every product. It is
cheaper to move matrices once, so that each device gets whole ones of its own, a share of every
stack, and to move the results back:

    leaves of one shape, each split over the devices
      → one stack → split along the stack (one all-to-all) → iterate, each device on its own
      → split as before (one all-to-all) → leaves

`shard_over` names the mesh axes over which this is done: one name, several, `()` for none, or None
for the default. Which way the information comes in decides how this is written, not what happens:

- **Explicit mesh** (JAX's default): shardings are in the types, so nothing has to be said. The
  default is all Explicit axes.
- **Auto mesh in force** (`jax.set_mesh`): the default is all Auto axes. The compiler knows how
  arrays are split. Over axes along which they are replicated, such as `data`, each device takes its
  share of the stack and results are gathered, which costs less than doing all the work everywhere.
  Types do not say which axes these are, so they are to come first, in the mesh (as in `("data",
  "fsdp")`) or in `shard_over`: what follows then moves a share only.
- **Auto mesh not in force** (arrays were put on it, `jit` has `in_shardings`): there is nothing
  that says so. No default and no names: the compiler does as it thinks best, which is to gather.
- **Inside `shard_map` or `pmap`**, with replicated parameters and averaged gradients: `shard_over`
  names mapped axes. Each device takes its share of the stack, and the results are gathered. By
  default every device does all the work. A leaf that varies over one of these axes (its type says
  so) is each device's own matter and stays where it is. So what a device holds must be whole
  matrices: parts of them would be orthogonalized each on its own, and nothing here can tell. Under
  `check_vma=False` and in `pmap` types say nothing: every leaf must then be the same everywhere if
  `shard_over` is given.

Stacks that do not divide are padded with zeros. A stack of one matrix has nothing to be spread: it
is gathered, and every device iterates it, which takes the time of one matrix either way, and less
communication. Scan-stacked leaves (layout letter `b`) count with every matrix they hold.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from scion_jax import numerics
from scion_jax.distributed import sharding
from scion_jax.distributed.bucketing import joined, map_buckets, split
from scion_jax.distributed.routes import Compute, Route, find_route, run_here
from scion_jax.polar.spectral_bound import spectral_norm_bound

if TYPE_CHECKING:
    from scion_jax.polar.orthogonalizers import Orthogonalizer

Names = str | Sequence[str] | None


def check_names(shard_over: Names) -> tuple[str, ...] | None:
    """Reads `shard_over`.

    Args:
        shard_over: One name of a mesh axis, several, `()` for none, or None for the default.

    Returns:
        The names, or None.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a name occurs twice.
    """
    if shard_over is None:
        return None
    names = (shard_over,) if isinstance(shard_over, str) else shard_over
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "shard_over holds names of mesh axes, such as 'fsdp' or ('data', 'fsdp'), () for none; "
            f"got {shard_over!r}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"shard_over names an axis twice: {tuple(names)}")
    return tuple(names)


def polar_factors(
    matrices: Sequence[jax.Array],
    orthogonalizer: Orthogonalizer,
    shard_over: tuple[str, ...] | None = None,
) -> list[jax.Array]:
    """Orthogonalizes batches of matrices, those of one shape together, spread over devices.

        U Σ Vᵀ  →  U Vᵀ

    Args:
        matrices: Arrays `(batch, rows, columns)` of any sizes, floating dtypes and shardings.
        orthogonalizer: How.
        shard_over: Names of the axes to spread over; see the module.

    Returns:
        The polar factors, in the order, shapes, dtypes and shardings of `matrices`.

    Raises:
        ValueError: If a name belongs to no axis, neither a mapped one nor one of the current mesh.
    """
    whole = [index for index, stack in enumerate(matrices) if stack.size]
    results = list(matrices)
    polars = _spread(
        functools.partial(map_buckets, orthogonalizer.polar),
        [matrices[index] for index in whole],
        [orthogonalizer.communication_dtype(matrices[index].dtype) for index in whole],
        shard_over,
    )
    for index, polar in zip(whole, polars, strict=True):
        results[index] = sharding.shard_like(polar.astype(matrices[index].dtype), matrices[index])
    return results


def spectral_norm_bounds(
    matrices: Sequence[jax.Array], shard_over: tuple[str, ...] | None = None
) -> list[jax.Array]:
    """Bounds the largest singular values from above, as `polar_factors` spreads its work.

    Args:
        matrices: Arrays `(batch, rows, columns)` of any sizes, floating dtypes and shardings.
        shard_over: Names of the axes to spread over; see the module.

    Returns:
        Bounds `(batch,)`, at least float32, on all devices; see `spectral_bound`.

    Raises:
        ValueError: If a name belongs to no axis, neither a mapped one nor one of the current mesh.
    """
    dtypes = [numerics.widest(stack.dtype, jnp.float32) for stack in matrices]
    results = [jnp.zeros(s.shape[:1], dtype) for s, dtype in zip(matrices, dtypes, strict=True)]
    whole = [index for index, stack in enumerate(matrices) if stack.size]
    bounds = _spread(
        functools.partial(map_buckets, spectral_norm_bound),
        [matrices[index] for index in whole],
        [dtypes[index] for index in whole],
        shard_over,
        measures=True,
    )
    for index, bound in zip(whole, bounds, strict=True):
        results[index] = bound.astype(dtypes[index])
    return results


def _spread(
    compute: Compute,
    stacks: Sequence[jax.Array],
    dtypes: Sequence[DTypeLike],
    names: tuple[str, ...] | None,
    measures: bool = False,
) -> list[jax.Array]:
    """Computes something for every matrix of some stacks, each on one device.

    Args:
        compute: Maps stacks to stacks of the same shapes, each matrix on its own, or to one number
            for each matrix.
        stacks: Arrays `(batch, rows, columns)`, one for each leaf, not empty.
        dtypes: What each is cast to.
        names: The axes to spread over.
        measures: Whether `compute` returns numbers.

    Returns:
        The results, in the order of `stacks`; numbers are on all devices.
    """
    route = find_route(stacks, names)
    groups: dict[Hashable, list[int]] = {}
    for index, (stack, dtype) in enumerate(zip(stacks, dtypes, strict=True)):
        groups.setdefault((jnp.dtype(dtype), *_place(index, stack)), []).append(index)
    travelling: list[list[int]] = []
    staying: list[list[int]] = []
    for group in groups.values():
        count = sum(stacks[index].shape[0] for index in group)
        travels = route and count > 1 and not route.differs(stacks[group[0]])
        (travelling if travels else staying).append(group)

    def stacked(group: list[int], multiple: int = 1) -> jax.Array:
        parts = [stacks[index].astype(dtypes[index]) for index in group]
        missing = -sum(part.shape[0] for part in parts) % multiple
        if missing:
            if jax.typeof(parts[0]).sharding.spec[0] is not None:
                parts = [sharding.replicate(part) for part in parts]
            parts += [jnp.zeros_like(jax.lax.slice_in_dim(parts[0], 0, 1))] * missing
        return joined(parts)

    results: list[jax.Array] = list(stacks)
    everywhere = route.run_everywhere if route else run_here
    computed = everywhere(compute, [stacked(group) for group in staying])
    if route and travelling:
        padded = [stacked(group, route.devices) for group in travelling]
        computed += _measure(route, compute, padded) if measures else route.run(compute, padded)
    for group, result in zip([*staying, *travelling], computed, strict=True):
        pieces = split(result, [stacks[index].shape[0] for index in group])
        for index, piece in zip(group, pieces, strict=True):
            results[index] = piece
    return results


def _measure(route: Route, compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """Computes one number for each matrix, and gathers those of all stacks at once."""
    dtype = numerics.widest(*(stack.dtype for stack in stacks))

    def compute_together(shares: list[jax.Array]) -> list[jax.Array]:
        return [joined([numbers.astype(dtype) for numbers in compute(shares)])]

    (numbers,) = route.run(compute_together, stacks)
    table = numbers.reshape(route.devices, -1)  # what each device computed
    ends = list(itertools.accumulate(stack.shape[0] // route.devices for stack in stacks))
    return [part.reshape(-1) for part in jnp.split(table, ends[:-1], axis=1)]


def _place(index: int, stack: jax.Array) -> tuple[Hashable, ...]:
    """Tells stacks apart that cannot be joined: of another shape, or split in another way."""
    spec = jax.typeof(stack).sharding.spec
    # One that is split along itself, as scanned layers may be, is a stack of its own.
    split_along_itself = index if spec and spec[0] is not None else None
    return stack.shape[1:], tuple(spec), sharding.varying(stack), split_along_itself
