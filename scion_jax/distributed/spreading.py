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

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from scion_jax import numerics
from scion_jax.distributed import sharding
from scion_jax.distributed.bucketing import joined, map_buckets, split
from scion_jax.polar.spectral_bound import spectral_norm_bound

if TYPE_CHECKING:
    from scion_jax.polar.orthogonalizers import Orthogonalizer

Names = str | Sequence[str] | None
Compute = Callable[[list[jax.Array]], list[jax.Array]]


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
    route = _route(stacks, names)
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
        if missing and jax.typeof(parts[0]).sharding.spec[0] is not None:
            parts = [sharding.replicate(part) for part in parts]
        zeros = jnp.zeros_like(jax.lax.slice_in_dim(parts[0], 0, 1))
        return joined([*parts, *[zeros] * missing])

    results: list[jax.Array] = list(stacks)
    everywhere = route.run_everywhere if route else _run_here
    computed = everywhere(compute, [stacked(group) for group in staying])
    if route and travelling:
        padded = [stacked(group, route.devices) for group in travelling]
        computed += _measure(route, compute, padded) if measures else route.run(compute, padded)
    for group, result in zip([*staying, *travelling], computed, strict=True):
        pieces = split(result, [stacks[index].shape[0] for index in group])
        for index, piece in zip(group, pieces, strict=True):
            results[index] = piece
    return results


def _measure(
    route: _Mesh | _Mapped, compute: Compute, stacks: Sequence[jax.Array]
) -> list[jax.Array]:
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


def _route(stacks: Sequence[jax.Array], names: tuple[str, ...] | None) -> _Mesh | _Mapped | None:
    """Finds how matrices get to their devices; None if there is one device, or nothing is said."""
    if names and all(map(_is_mapped, names)):
        route = _Mapped(names)
        return route if route.devices > 1 else None
    mesh = jax.sharding.get_abstract_mesh()
    for stack in stacks:
        mesh = jax.typeof(stack).sharding.mesh if mesh.empty else mesh
    if names is None:
        names = mesh.explicit_axes or (() if mesh.manual_axes else mesh.auto_axes)
    unknown = [name for name in names if name not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"shard_over names {unknown[0]!r}, which is neither an axis of the current mesh (its "
            f"axes: {mesh.axis_names}) nor a mapped one; call the optimizer under "
            "jax.set_mesh(mesh), or inside of shard_map or pmap over that axis"
        )
    # Axes that matrices are split over come last, so that these move a share only.
    specs = [part for stack in stacks for part in jax.typeof(stack).sharding.spec]
    split_over = {name for part in specs for name in _names_of(part)}
    names = sorted(names, key=lambda name: name in split_over)
    route = _Mesh(mesh, tuple(name for name in names if mesh.shape[name] > 1))
    return route if route.devices > 1 else None


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _run_here(compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    return compute([sharding.replicate(stack) for stack in stacks])


@dataclasses.dataclass(frozen=True)
class _Mesh:
    """Matrices travel because the compiler is told where they are to be."""

    mesh: AbstractMesh
    names: tuple[str, ...]

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.names)

    def differs(self, stack: jax.Array) -> bool:
        """Tells whether the stack is another one on every device: never, arrays are global here."""
        del stack
        return False

    @property
    def _is_explicit(self) -> bool:
        return set(self.names) <= set(self.mesh.explicit_axes)

    def _moved(self, stack: jax.Array, specs: Sequence[PartitionSpec]) -> jax.Array:
        place = jax.sharding.reshard if self._is_explicit else jax.lax.with_sharding_constraint
        for spec in specs:
            stack = place(stack, NamedSharding(self.mesh, spec))
        return stack

    def run_everywhere(self, compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Gathers stacks and computes the same on every device."""
        whole = [self._moved(stack, [PartitionSpec(*(None,) * stack.ndim)]) for stack in stacks]
        return self._on_each(compute, whole, PartitionSpec())

    def run(self, compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Moves stacks to the devices, computes on each, and moves the results back."""
        find = self._stages if self._is_explicit else self._free_stages
        stages = [find(stack) for stack in stacks]
        moved = [self._moved(stack, stage) for stack, stage in zip(stacks, stages, strict=True)]
        computed = self._on_each(compute, moved, PartitionSpec(self.names))
        if computed[0].ndim == 1:
            return [self._moved(numbers, [PartitionSpec(None)]) for numbers in computed]
        return [
            self._moved(result, stage[-2::-1])
            for result, stage in zip(computed, stages, strict=True)
        ]

    def _on_each(
        self, compute: Compute, stacks: Sequence[jax.Array], spec: PartitionSpec
    ) -> list[jax.Array]:
        """Computes on each device what it has: no axis is left to the compiler to split."""
        if not stacks:
            return []
        return jax.shard_map(
            compute,
            mesh=self.mesh,
            in_specs=(spec,),
            out_specs=spec,
            axis_names=set(self.mesh.axis_names) - set(self.mesh.manual_axes),
        )(list(stacks))

    def _stages(self, stack: jax.Array) -> list[PartitionSpec]:
        """Lists the shardings on the way, from where the stack is to where its matrices are whole.

        One axis moves at a time: that is one all-to-all each. All axes at once would be gathered.
        """
        spec = tuple(jax.typeof(stack).sharding.spec)
        stages = [PartitionSpec(*spec)]
        for count in range(1, len(self.names) + 1):
            there = self.names[:count]
            rest = (tuple(n for n in _names_of(part) if n not in there) for part in spec[1:])
            stages.append(PartitionSpec(there, *(part or None for part in rest)))
        stages.append(PartitionSpec(self.names, *(None,) * (stack.ndim - 1)))
        return stages

    def _free_stages(self, stack: jax.Array) -> list[PartitionSpec]:
        """Lists them where types do not say how the stack is split: the compiler knows the rest."""
        free = (PartitionSpec.UNCONSTRAINED,) * (stack.ndim - 1)
        partial = [
            PartitionSpec(self.names[:count] or None, *free) for count in range(len(self.names))
        ]
        return [*partial, PartitionSpec(self.names, *(None,) * (stack.ndim - 1))]


def _names_of(part: Any) -> tuple[str, ...]:
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """Matrices are taken and results gathered by the program that runs on every device."""

    names: tuple[str, ...]

    @property
    def devices(self) -> int:
        return math.prod(jax.lax.axis_size(name) for name in self.names)

    def run_everywhere(self, compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Computes the same on every device."""
        return _run_here(compute, stacks)

    def differs(self, stack: jax.Array) -> bool:
        """Tells whether the stack is another one on every device, as its type says."""
        return not sharding.varying(stack).isdisjoint(self.names)

    def run(self, compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Takes each device's share, computes, and gathers."""
        position = jax.lax.axis_index(self.names)
        # Under shard_map's checks the result is the same on all devices by type, too.
        to = "invarying" if sharding.varying(position) else "varying"

        def share(stack: jax.Array) -> jax.Array:
            size = stack.shape[0] // self.devices
            return jax.lax.dynamic_slice_in_dim(stack, position * size, size)

        computed = compute([share(stack) for stack in stacks])
        return [jax.lax.all_gather(own, self.names, tiled=True, to=to) for own in computed]
