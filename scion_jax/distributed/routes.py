"""Routes: how stacks of matrices get to the devices that work on them, and back.

`spreading` says what for. On a mesh the compiler is told where arrays are to be; inside of
`shard_map` and `pmap` the program moves them itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from scion_jax.distributed import sharding

Compute = Callable[[list[jax.Array]], list[jax.Array]]


def find_route(
    stacks: Sequence[jax.Array], names: tuple[str, ...] | None
) -> MeshRoute | MappedRoute | None:
    """Finds how matrices get to their devices.

    Args:
        stacks: Arrays `(batch, rows, columns)`.
        names: The axes to spread over, or None; see `spreading`.

    Returns:
        The way; None if there is one device, or nothing is said.

    Raises:
        ValueError: If a name belongs to no axis.
    """
    if names and all(map(_is_mapped, names)):
        route = MappedRoute(names)
        return route if route.devices > 1 else None
    mesh = jax.sharding.get_abstract_mesh()
    for stack in stacks:
        mesh = jax.typeof(stack).sharding.mesh if mesh.empty else mesh
    default = mesh.explicit_axes or (() if mesh.manual_axes else mesh.auto_axes)
    chosen = tuple(default or ()) if names is None else names
    unknown = [name for name in chosen if name not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"shard_over names {unknown[0]!r}, which is neither an axis of the current mesh (its "
            f"axes: {mesh.axis_names}) nor a mapped one; call the optimizer under "
            "jax.set_mesh(mesh), or inside of shard_map or pmap over that axis"
        )
    # Axes that matrices are split over come last, so that these move a share only.
    specs = [part for stack in stacks for part in jax.typeof(stack).sharding.spec]
    split_over = {name for part in specs for name in sharding.names_of(part)}
    ordered = sorted(chosen, key=lambda name: name in split_over)
    route = MeshRoute(mesh, tuple(name for name in ordered if mesh.shape[name] > 1))
    return route if route.devices > 1 else None


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def run_here(compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """Computes on whole stacks; on a mesh every device does the same."""
    return compute([sharding.replicate(stack) for stack in stacks])


@dataclasses.dataclass(frozen=True)
class MeshRoute:
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
        )(list(stacks))

    def _stages(self, stack: jax.Array) -> list[PartitionSpec]:
        """Lists the shardings on the way, from where the stack is to where its matrices are whole.

        One axis moves at a time: that is one all-to-all each. All axes at once would be gathered.
        """
        spec = tuple(jax.typeof(stack).sharding.spec)
        stages = [PartitionSpec(*spec)]
        for count in range(1, len(self.names) + 1):
            there = self.names[:count]
            parts = [sharding.names_of(part) for part in spec[1:]]
            rest = [tuple(name for name in part if name not in there) for part in parts]
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


@dataclasses.dataclass(frozen=True)
class MappedRoute:
    """Matrices are taken and results gathered by the program that runs on every device."""

    names: tuple[str, ...]

    @property
    def devices(self) -> int:
        return math.prod(jax.lax.axis_size(name) for name in self.names)

    def run_everywhere(self, compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Computes the same on every device."""
        return run_here(compute, stacks)

    def differs(self, stack: jax.Array) -> bool:
        """Tells whether the stack is another one on every device, as its type says."""
        return not sharding.varying(stack).isdisjoint(self.names)

    def run(self, compute: Compute, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """Takes each device's share, computes, and gathers."""
        position = jax.lax.axis_index(self.names)
        # Under shard_map's checks the result is the same on all devices by type, too.
        shared = bool(sharding.varying(position))

        def share(stack: jax.Array) -> jax.Array:
            size = stack.shape[0] // self.devices
            return jax.lax.dynamic_slice_in_dim(stack, position * size, size)

        computed = compute([share(stack) for stack in stacks])
        return [sharding.gather_mapped(own, self.names, shared) for own in computed]


Route = MeshRoute | MappedRoute
