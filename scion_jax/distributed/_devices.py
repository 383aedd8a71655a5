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
  With `with_shardings`, which says how parameters are split, an update runs on Explicit axes
  instead.
- **Auto mesh not in force** (arrays were put on it, `jit` has `in_shardings`): there is nothing
  that says so. No default and no names: the compiler does as it thinks best, which is to gather.
- **Inside `shard_map` or `pmap`**, with replicated parameters and averaged gradients: `shard_over`
  names mapped axes. Each device takes its share of the stack, and the results are gathered. By
  default every device does all the work. A leaf that varies over one of these axes (its type says
  so) is each device's own matter and stays where it is. So what a device holds must be whole
  matrices: parts of them would be orthogonalized each on its own, and nothing here can tell. Under
  `check_vma=False` and in `pmap` types say nothing: every leaf must then be the same everywhere if
  `shard_over` is given.

Stacks that do not divide are padded with zeros, where `_places` says. A stack of one matrix has
nothing to be spread: it is gathered, and every device iterates it, which takes the time of one
matrix either way, and less communication. Scan-stacked leaves (layout letter `b`) count with every
matrix they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from scion_jax import _sharding as sharding
from scion_jax.distributed._places import placed, places, taken_back
from scion_jax.distributed._stacks import Stacks
from scion_jax.distributed._ways import Way, Work, padded, there_and_back


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
    numbers: bool = False,
    may_be_skipped: bool = False,
) -> list[jax.Array]:
    """Applies a function to every matrix, those of one shape together, each on one device.

    Args:
        function: Maps matrices in pieces, `(down, across, batch, rows, columns)`, to as many, each
            on its own.
        matrices: Arrays `(batch, rows, columns)`, none empty, of any shardings.
        shard_over: Names of the axes to spread over; see the module.
        origins: What each was made of, such as a leaf's shape: on Auto axes, where types do not say
            how it is split, only those of one origin are joined.
        numbers: Whether the function maps each matrix to a number instead, `(1, 1, batch, 1, 1)`.
        may_be_skipped: Whether devices without a matrix need not call it.

    Returns:
        The results, in the order of `matrices` and split as they are; numbers `(batch, 1, 1)` are
        on all devices.

    Raises:
        ValueError: If a name belongs to no axis, neither a mapped one nor one of the current mesh.
    """
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
        some = [stacks.joined[i] for i in members]
        spread = _spread(Work(function, numbers, may_be_skipped), some, shard_over, mesh)
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
    work: Work, stacks: list[jax.Array], names: tuple[str, ...] | None, mesh: AbstractMesh
) -> list[jax.Array]:
    if names and all(map(_is_mapped, names)):
        return _over_mapped_axes(work, stacks, names)
    default = mesh.explicit_axes or (() if mesh.manual_axes else mesh.auto_axes)
    chosen = default if names is None else names
    unknown = [name for name in chosen if name not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"shard_over names {unknown[0]!r}, which is neither an axis of the current mesh (its "
            f"axes: {mesh.axis_names}) nor a mapped one; call the optimizer under "
            "jax.set_mesh(mesh), or inside of shard_map or pmap over that axis"
        )
    several = tuple(name for name in chosen if mesh.shape[name] > 1)
    over_axes = _over_auto_axes if set(several) - set(mesh.explicit_axes) else _over_explicit_axes
    return over_axes(work, stacks, several, mesh)


def _is_mapped(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _over_mapped_axes(
    work: Work, stacks: list[jax.Array], names: tuple[str, ...]
) -> list[jax.Array]:
    """Shares out what all devices have."""

    def is_spread(stack: jax.Array) -> bool:
        return stack.shape[0] > 1 and sharding.varying(stack).isdisjoint(names)

    ways = [Way(shared=names if is_spread(stack) else ()) for stack in stacks]
    return there_and_back(work, list(map(sharding.replicate, stacks)), ways)


def _over_explicit_axes(
    work: Work, stacks: list[jax.Array], names: tuple[str, ...], mesh: AbstractMesh
) -> list[jax.Array]:
    """Moves matrices by what their types say."""
    ways = [_way(stack, names) for stack in stacks]
    if not any(way.names for way in ways):
        # Each alone: on an Auto mesh they may be split in different ways.
        whole = [[sharding.replicate(stack)] for stack in stacks]
        return [there_and_back(work, one, [Way()])[0] for one in whole]
    ways = _with_places(work, stacks, ways, [() if way.own else way.names for way in ways], mesh)
    there = []
    for stack, way in zip(stacks, ways, strict=True):
        stack = jax.sharding.reshard(stack, NamedSharding(mesh, way.spec))
        there.append(stack if way.own else _filled_up(stack, way, mesh))
    results = _on_mesh(work, there, ways, mesh)
    results = list(map(_taken_back, results, ways))
    return list(map(sharding.replicate, results)) if work.numbers else results


def _way(stack: jax.Array, names: tuple[str, ...]) -> Way:
    if stack.shape[0] == 1:
        return Way()
    own, *sides = [sharding.names_of(part) for part in jax.typeof(stack).sharding.spec]
    # What a stack is split over along itself stays, whatever is to be spread over.
    rows, columns = (tuple(name for name in side if name in names) for side in sides)
    shared = tuple(name for name in names if name not in (*own, *rows, *columns))
    return Way(own, shared, rows, columns)


def _over_auto_axes(
    work: Work, stacks: list[jax.Array], names: tuple[str, ...], mesh: AbstractMesh
) -> list[jax.Array]:
    """Tells the compiler, which knows how matrices are split, where they are to be."""

    def moved(stack: jax.Array, specs: Sequence[PartitionSpec]) -> jax.Array:
        for spec in specs:
            stack = jax.lax.with_sharding_constraint(stack, NamedSharding(mesh, spec))
        return stack

    def stages(way: Way) -> list[PartitionSpec]:
        # One axis moves at a time; all at once would be gathered.
        free = (PartitionSpec.UNCONSTRAINED,) * 2
        return [PartitionSpec(way.own[:count] or None, *free) for count in range(len(way.own))]

    ways = []
    for stack in stacks:
        own = sharding.names_of(jax.typeof(stack).sharding.spec[0])
        axes = (*(name for name in own if name not in names), *names)
        ways.append(Way(axes if stack.shape[0] > 1 else ()))
    ways = _with_places(work, stacks, ways, [way.own for way in ways], mesh)
    there = [
        moved(_filled_up(stack, way, mesh), [*stages(way), way.spec])
        for stack, way in zip(stacks, ways, strict=True)
    ]
    results = [
        moved(result, [PartitionSpec(None, None, None)] if work.numbers else stages(way)[::-1])
        for result, way in zip(_on_mesh(work, there, ways, mesh), ways, strict=True)
    ]
    return list(map(_taken_back, results, ways))


def _with_places(
    work: Work,
    stacks: list[jax.Array],
    ways: list[Way],
    orders: list[tuple[str, ...]],
    mesh: AbstractMesh,
) -> list[Way]:
    """Finds places for stacks that go to the same devices.

    Args:
        work: What is computed.
        stacks: The stacks.
        ways: Their ways.
        orders: The axes that number the devices that each goes to; empty if it stays.
        mesh: The devices.

    Returns:
        The ways, with places.
    """
    result = list(ways)
    for order in dict.fromkeys(order for order in orders if order and work.may_be_skipped):
        members = [index for index, other in enumerate(orders) if other == order]
        of_members = places([stacks[index] for index in members], _count(order, mesh))
        for index, found in zip(members, of_members, strict=True):
            result[index] = ways[index]._replace(places=found)
    return result


def _filled_up(stack: jax.Array, way: Way, mesh: AbstractMesh) -> jax.Array:
    devices = _count(way.names, mesh)
    return placed(stack, way.places, devices) if way.places else padded(stack, devices)


def _taken_back(stack: jax.Array, way: Way) -> jax.Array:
    return taken_back(stack, way.places) if way.places else stack


def _count(names: tuple[str, ...], mesh: AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _on_mesh(
    work: Work, stacks: list[jax.Array], ways: list[Way], mesh: AbstractMesh
) -> list[jax.Array]:
    return jax.shard_map(
        lambda stacks: there_and_back(work, stacks, ways),
        mesh=mesh,
        in_specs=([way.spec for way in ways],),
        out_specs=[Way(way.own).spec if work.numbers else way.spec for way in ways],
    )(stacks)
