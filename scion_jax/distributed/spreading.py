"""Spreading: which device orthogonalizes which matrix.

An iteration on a matrix that is split over devices would communicate in every product. It is
cheaper to move matrices once, so that each device gets whole ones of its own, a share of every
stack, and to move the results back:

    leaves of one shape, each split over the devices
      → one stack → split along the stack (one all-to-all) → iterate, each device on its own
      → split as before (one all-to-all) → leaves

Which way the information comes in decides how this is written, not what happens:

- **Explicit mesh** (JAX's default): shardings are in the types, so nothing has to be said. All
  Explicit axes are used, or those that `shard_over` names.
- **Auto mesh**: `shard_over` names the axes; the mesh is the one of `jax.set_mesh`.
- **Inside `shard_map` or `pmap`**, with replicated parameters and averaged gradients: `shard_over`
  names mapped axes. Each device takes its share of the stack, and the results are gathered.
  Without `shard_over` every device does all the work. A leaf that differs between the devices of
  those axes (its type says so) is each device's own matter and stays where it is.

Stacks that do not divide are padded with zeros. A stack of one matrix has nothing to be spread: it
is gathered, and every device iterates it, which takes the time of one matrix either way, and less
communication. Scan-stacked leaves (layout letter `b`) count with every matrix they hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from scion_jax import numerics
from scion_jax.distributed import sharding
from scion_jax.distributed.bucketing import measure_stacks
from scion_jax.polar.orthogonalizers import Orthogonalizer, orthogonalize_stacks
from scion_jax.polar.spectral_bound import spectral_norm_bound

Names = str | Sequence[str] | None
Compute = Callable[[list[jax.Array], list[Any]], list[jax.Array]]


def check_names(shard_over: Names) -> tuple[str, ...]:
    """Reads `shard_over`.

    Args:
        shard_over: One name of a mesh axis, several, or None.

    Returns:
        The names.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a name occurs twice.
    """
    if shard_over is None:
        return ()
    names = (shard_over,) if isinstance(shard_over, str) else tuple(shard_over)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"shard_over holds names of mesh axes, such as ('fsdp',); got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"shard_over names an axis twice: {names}")
    return names


def spread(
    compute: Compute,
    stacks: Sequence[jax.Array],
    kinds: Sequence[Hashable],
    names: tuple[str, ...],
    travel_dtype: DTypeLike | None = None,
) -> list[jax.Array]:
    """Computes something for every entry of some stacks, each entry on one device.

    Args:
        compute: Maps stacks and their kinds to stacks of the same shapes, each entry on its own, or
            to one number for each entry.
        stacks: Arrays `(batch, …)`, one for each leaf.
        kinds: What else `compute` must know of each; stacks of one kind and shape travel together.
        names: The axes to spread over; empty for all axes of an Explicit mesh.
        travel_dtype: What entries are cast to while they travel; None for their own dtype.

    Returns:
        The results, in the order, shapes and shardings of `stacks`; numbers are on all devices.

    Raises:
        ValueError: If a name belongs to no axis, neither a mapped one nor one of the current mesh.
    """
    route = _route(stacks, names)
    results: list[jax.Array] = list(stacks)
    groups: dict[Hashable, list[int]] = {}
    for index, (stack, kind) in enumerate(zip(stacks, kinds, strict=True)):
        groups.setdefault((kind, stack.shape[1:], *_split(index, stack)), []).append(index)

    travelling = []
    staying: list[int] = []
    for group in groups.values():
        count = sum(stacks[index].shape[0] for index in group)
        if route and count > 1 and not route.differs(stacks[group[0]]):
            travelling.append(group)
        else:
            staying.extend(group)

    everywhere = route.run_everywhere if route else _run_here
    whole = everywhere(compute, [stacks[i] for i in staying], [kinds[i] for i in staying])
    for index, result in zip(staying, whole, strict=True):
        results[index] = _settled(result, stacks[index])
    if not (route and travelling):
        return results

    joined = [jnp.concatenate([stacks[i] for i in group]) for group in travelling]
    padded = [_padded(stack.astype(travel_dtype or stack.dtype), route.devices) for stack in joined]
    computed = route.run(compute, padded, [kinds[group[0]] for group in travelling])
    for group, result in zip(travelling, computed, strict=True):
        start = 0
        for index in group:
            stop = start + stacks[index].shape[0]
            piece = jax.lax.slice_in_dim(result, start, stop)
            results[index] = _settled(piece, stacks[index])
            start = stop
    return results


def _settled(result: jax.Array, stack: jax.Array) -> jax.Array:
    result = result.astype(stack.dtype)
    return result if result.ndim < stack.ndim else sharding.shard_like(result, stack)


def _split(index: int, stack: jax.Array) -> tuple[Hashable, ...]:
    """Tells stacks apart that cannot be joined: of another dtype, or split in another way."""
    spec = jax.typeof(stack).sharding.spec
    # One that is split along itself, as scanned layers may be, is a stack of its own.
    return stack.dtype, tuple(spec), index if spec and spec[0] is not None else None


def _padded(stack: jax.Array, devices: int) -> jax.Array:
    missing = -stack.shape[0] % devices
    if not missing:
        return stack
    spec = jax.typeof(stack).sharding.spec
    if spec and spec[0] is not None:
        stack = sharding.replicate(stack)
    return jnp.pad(stack, ((0, missing), *((0, 0),) * (stack.ndim - 1)))


def _route(stacks: Sequence[jax.Array], names: tuple[str, ...]) -> _Mesh | _Mapped | None:
    """Finds how entries get to their devices; None if there is one device, or nothing is said."""
    if names and all(map(_is_mapped, names)):
        route = _Mapped(names)
        return route if route.devices > 1 else None
    mesh = jax.sharding.get_abstract_mesh()
    for stack in stacks:
        mesh = jax.typeof(stack).sharding.mesh if mesh.empty else mesh
    unknown = [name for name in names if name not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"shard_over names {unknown[0]!r}, which is neither an axis of the current mesh (its "
            f"axes: {mesh.axis_names}) nor a mapped one; call the optimizer under "
            "jax.set_mesh(mesh), or inside of shard_map or pmap over that axis"
        )
    route = _Mesh(mesh, names or mesh.explicit_axes)
    return route if route.devices > 1 else None


def _run_here(compute: Compute, stacks: Sequence[jax.Array], kinds: list[Any]) -> list[jax.Array]:
    return compute([sharding.replicate(stack) for stack in stacks], kinds)


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Mesh:
    """Entries travel because the compiler is told where they are to be."""

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
        # As integers: XLA for CPUs would move bfloat16 as float32, at twice the bytes.
        short = stack.dtype == jnp.bfloat16
        bits = jax.lax.bitcast_convert_type(stack, jnp.uint16) if short else stack
        for spec in specs:
            bits = place(bits, NamedSharding(self.mesh, spec))
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16) if short else bits

    def run_everywhere(
        self, compute: Compute, stacks: Sequence[jax.Array], kinds: list[Any]
    ) -> list[jax.Array]:
        """Gathers stacks and computes the same on every device."""
        whole = [self._moved(stack, [PartitionSpec(*(None,) * stack.ndim)]) for stack in stacks]
        return self._on_each(compute, whole, kinds, PartitionSpec())

    def run(
        self, compute: Compute, stacks: Sequence[jax.Array], kinds: list[Any]
    ) -> list[jax.Array]:
        """Moves stacks to the devices, computes on each, and moves the results back."""
        stages = [
            self._stages(stack) if self._is_explicit else self._free_stages(stack)
            for stack in stacks
        ]

        moved = [self._moved(stack, stage) for stack, stage in zip(stacks, stages, strict=True)]
        computed = self._on_each(compute, moved, kinds, PartitionSpec(self.names))
        nowhere = [PartitionSpec(None)]  # one number for each entry: to all devices
        return [
            self._moved(result, stage[-2::-1] if result.ndim > 1 else nowhere)
            for result, stage in zip(computed, stages, strict=True)
        ]

    def _on_each(
        self,
        compute: Compute,
        stacks: Sequence[jax.Array],
        kinds: list[Any],
        spec: PartitionSpec,
    ) -> list[jax.Array]:
        """Computes on each device what it has: no axis is left to the compiler to split."""
        if not stacks:
            return []
        return jax.shard_map(
            lambda shares: compute(shares, kinds),
            mesh=self.mesh,
            in_specs=(spec,),
            out_specs=spec,
            axis_names=set(self.mesh.axis_names) - set(self.mesh.manual_axes),
        )(list(stacks))

    def _stages(self, stack: jax.Array) -> list[PartitionSpec]:
        """Lists the shardings on the way, from where the stack is to where its entries are whole.

        One axis moves at a time: that is one all-to-all each. All axes at once would be gathered.
        """
        spec = tuple(jax.typeof(stack).sharding.spec)
        # Those that the stack is split over come first: in the other order, they would be gathered.
        split = [name for part in spec for name in _names_of(part)]
        order = sorted(self.names, key=lambda name: name not in split)
        stages = [PartitionSpec(*spec)]
        for count in range(1, len(order) + 1):
            there = tuple(order[:count])
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
    """Entries are taken and results gathered by the program that runs on every device."""

    names: tuple[str, ...]

    @property
    def devices(self) -> int:
        return math.prod(jax.lax.axis_size(name) for name in self.names)

    def run_everywhere(
        self, compute: Compute, stacks: Sequence[jax.Array], kinds: list[Any]
    ) -> list[jax.Array]:
        """Computes the same on every device."""
        return _run_here(compute, stacks, kinds)

    def differs(self, stack: jax.Array) -> bool:
        """Tells whether the stack is another one on every device, as its type says."""
        return not sharding.varying(stack).isdisjoint(self.names)

    def run(
        self, compute: Compute, stacks: Sequence[jax.Array], kinds: list[Any]
    ) -> list[jax.Array]:
        """Takes each device's share, computes, and gathers."""
        position = jax.lax.axis_index(self.names)

        def share(stack: jax.Array) -> jax.Array:
            size = stack.shape[0] // self.devices
            return jax.lax.dynamic_slice_in_dim(stack, position * size, size)

        def gathered(own: jax.Array) -> jax.Array:
            if not sharding.varying(position):
                return jax.lax.all_gather(own, self.names, tiled=True)
            # Under shard_map's checks a sum is the same on all devices by type, a gather is not.
            alone = jnp.zeros((self.devices * own.shape[0], *own.shape[1:]), own.dtype)
            start = position * own.shape[0]
            alone = jax.lax.dynamic_update_slice_in_dim(alone, own, start, 0)
            return jax.lax.psum(alone, self.names)

        computed = compute([share(stack) for stack in stacks], kinds)

        return [gathered(own) for own in computed]


def polar_factors(
    matrices: Sequence[jax.Array],
    orthogonalizer: Orthogonalizer,
    shard_over: tuple[str, ...] | None = None,
) -> list[jax.Array]:
    """Orthogonalizes batches of matrices, those of one shape together."""
    if not matrices:
        return []
    wide = [numerics.at_least_float32(m) for m in matrices]
    dtype = numerics.widest(*(m.dtype for m in wide))

    def compute(stacks: list[jax.Array], kinds: list[Any]) -> list[jax.Array]:
        del kinds
        return orthogonalize_stacks(stacks, orthogonalizer)

    polars = spread(
        compute,
        wide,
        [None] * len(wide),
        shard_over or (),
        orthogonalizer.travel_dtype(dtype),
    )
    return [p.astype(m.dtype) for p, m in zip(polars, matrices, strict=True)]


def spectral_norm_bounds(
    matrices: Sequence[jax.Array], shard_over: tuple[str, ...] | None = None
) -> list[jax.Array]:
    """Bounds the spectral norms of batches of matrices from above."""
    if not matrices:
        return []

    def compute(stacks: list[jax.Array], kinds: list[Any]) -> list[jax.Array]:
        del kinds
        return measure_stacks(
            lambda stack: (
                spectral_norm_bound(stack)
                if stack.small
                else jnp.zeros(sum(stack.sizes), stack.dtype)
            ),
            stacks,
        )

    wide = [numerics.at_least_float32(m) for m in matrices]
    return spread(compute, wide, [None] * len(wide), shard_over or ())
