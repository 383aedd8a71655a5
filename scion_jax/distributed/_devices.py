"""Which device works on which matrix, and what `shard_over` means.

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

import math
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from scion_jax import _sharding as sharding
from scion_jax.distributed._stacks import Stacks

Compute = Callable[[list[jax.Array]], list[jax.Array]]


def check_shard_over(shard_over: str | Sequence[str] | None) -> tuple[str, ...] | None:
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


def over_devices(
    function: Callable[[jax.Array], jax.Array],
    matrices: Sequence[jax.Array],
    shard_over: tuple[str, ...] | None = None,
    origins: Sequence[Hashable] | None = None,
) -> list[jax.Array]:
    """Applies a function to every matrix, those of one shape together, each on one device.

    Args:
        function: Maps `(batch, rows, columns)` to the same shape or to `(batch, 1, 1)`, each matrix
            on its own.
        matrices: Arrays `(batch, rows, columns)`, none empty, of any shardings.
        shard_over: Names of the axes to spread over; see the module.
        origins: What each was made of, such as a leaf's shape: on Auto axes, where types do not say
            how it is split, only those of one origin are joined.

    Returns:
        The results, in the order of `matrices` and split as they are; numbers are on all devices.

    Raises:
        ValueError: If a name belongs to no axis, neither a mapped one nor one of the current mesh.
    """

    def compute(stacks: list[jax.Array]) -> list[jax.Array]:
        # Again, since what was split in different ways, or along itself, is here in one piece.
        here = Stacks(stacks, [(s.shape[1:], s.dtype, sharding.varying(s)) for s in stacks])
        return here.split([function(stack) for stack in here.joined])

    if not matrices:
        return []
    kinds: list[Hashable] = [_kind(index, stack) for index, stack in enumerate(matrices)]
    if origins and jax.sharding.get_abstract_mesh().auto_axes:
        kinds = list(zip(kinds, origins, strict=True))
    stacks = Stacks(matrices, kinds)
    results = list(stacks.joined)
    by_mesh: dict[AbstractMesh, list[int]] = {}
    for index, stack in enumerate(stacks.joined):
        by_mesh.setdefault(_mesh_of(stack), []).append(index)
    for mesh, members in by_mesh.items():
        spread = _spread(compute, [stacks.joined[i] for i in members], shard_over, mesh)
        for index, result in zip(members, spread, strict=True):
            results[index] = result
    return stacks.split(results)


def _mesh_of(stack: jax.Array) -> AbstractMesh:
    in_force = jax.sharding.get_abstract_mesh()
    return jax.typeof(stack).sharding.mesh if in_force.empty else in_force


def _kind(index: int, stack: jax.Array) -> tuple[object, ...]:
    """Tells stacks apart that cannot be joined: of another shape, or split in another way."""
    spec = jax.typeof(stack).sharding.spec
    # One that is split along itself, as scanned layers may be, is a stack of its own.
    alone = index if spec and spec[0] is not None else None
    return stack.shape[1:], stack.dtype, sharding.placement(stack), alone


def _spread(
    compute: Compute, stacks: list[jax.Array], names: tuple[str, ...] | None, mesh: AbstractMesh
) -> list[jax.Array]:
    if names and all(map(_is_mapped, names)):
        return _over_mapped_axes(compute, stacks, names)
    default = mesh.explicit_axes or (() if mesh.manual_axes else mesh.auto_axes)
    chosen = default if names is None else names
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
    several = tuple(name for name in ordered if mesh.shape[name] > 1)
    if not (several or any(_own_axes(stack) for stack in stacks)):
        return [compute([sharding.replicate(stack)])[0] for stack in stacks]
    return _over_mesh_axes(compute, stacks, several, mesh)


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _over_mesh_axes(
    compute: Compute, stacks: list[jax.Array], names: tuple[str, ...], mesh: AbstractMesh
) -> list[jax.Array]:
    """Tells the compiler where matrices are to be, and computes on each device what it has."""
    explicit = set(names) <= set(mesh.explicit_axes)
    place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint

    def moved(stack: jax.Array, specs: Sequence[PartitionSpec]) -> jax.Array:
        for spec in specs:
            stack = place(stack, NamedSharding(mesh, spec))
        return stack

    there, ways = [], []
    for stack in stacks:
        if stack.shape[0] == 1:
            way = [PartitionSpec(None, None, None)]
        else:
            # What a stack is split over along itself stays, whatever is to be spread over.
            axes = (*(name for name in _own_axes(stack) if name not in names), *names)
            stack = _padded(stack, math.prod(mesh.shape[name] for name in axes))
            way = _stages(stack, axes) if explicit else _free_stages(axes)
        there.append(moved(stack, way))
        ways.append(way)
    specs = [way[-1] for way in ways]
    computed = jax.shard_map(compute, mesh=mesh, in_specs=(specs,), out_specs=specs)(there)
    results = []
    for stack, result, way in zip(stacks, computed, ways, strict=True):
        is_whole = result.shape[1:] == stack.shape[1:]
        back = way[-2::-1] if is_whole else [PartitionSpec(None, None, None)]
        results.append(moved(result, back)[: stack.shape[0]])
    return results


def _own_axes(stack: jax.Array) -> tuple[str, ...]:
    return sharding.names_of(jax.typeof(stack).sharding.spec[0])


def _stages(stack: jax.Array, names: tuple[str, ...]) -> list[PartitionSpec]:
    """Lists the shardings on the way, from where the stack is to where its matrices are whole.

    One axis moves at a time: that is one all-to-all each. All axes at once would be gathered.
    """
    spec = tuple(jax.typeof(stack).sharding.spec)
    stages = [PartitionSpec(*spec)]
    for count in range(1, len(names) + 1):
        there = names[:count]
        parts = [sharding.names_of(part) for part in spec[1:]]
        rest = [tuple(name for name in part if name not in there) for part in parts]
        stages.append(PartitionSpec(there, *(part or None for part in rest)))
    return [*stages, PartitionSpec(names or None, None, None)]


def _free_stages(names: tuple[str, ...]) -> list[PartitionSpec]:
    """Lists them where types do not say how the stack is split: the compiler knows the rest."""
    free = (PartitionSpec.UNCONSTRAINED,) * 2
    partial = [PartitionSpec(names[:count] or None, *free) for count in range(len(names))]
    return [*partial, PartitionSpec(names, None, None)]


def _over_mapped_axes(
    compute: Compute, stacks: list[jax.Array], names: tuple[str, ...]
) -> list[jax.Array]:
    """Takes each device's share, computes, and gathers: the program that runs on every device."""
    devices = math.prod(jax.lax.axis_size(name) for name in names)
    position = jax.lax.axis_index(names)
    # Under shard_map's checks the result is the same on all devices by type, too.
    shared_by_type = bool(sharding.varying(position))

    def is_spread(stack: jax.Array) -> bool:
        return stack.shape[0] > 1 and sharding.varying(stack).isdisjoint(names)

    def share(stack: jax.Array) -> jax.Array:
        padded = _padded(stack, devices)
        size = padded.shape[0] // devices
        return jax.lax.dynamic_slice_in_dim(padded, position * size, size)

    computed = compute([share(s) if is_spread(s) else sharding.replicate(s) for s in stacks])
    return [
        sharding.gather_mapped(own, names, shared_by_type)[: stack.shape[0]]
        if is_spread(stack)
        else own
        for stack, own in zip(stacks, computed, strict=True)
    ]


def _padded(stack: jax.Array, multiple: int) -> jax.Array:
    missing = -stack.shape[0] % multiple
    if not missing:
        return stack
    if jax.typeof(stack).sharding.spec[0] is not None:
        stack = sharding.replicate(stack)
    zeros = jnp.zeros_like(jax.lax.slice_in_dim(stack, 0, 1))
    return jnp.concatenate([stack, *[zeros] * missing])
