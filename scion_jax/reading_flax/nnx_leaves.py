"""NNX: a model's parameters, found by walking over its modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from scion_jax.reading_flax import attending, layouts, nnx_roles
from scion_jax.reading_flax.layouts import Leaf
from scion_jax.reading_flax.nnx_roles import Role
from scion_jax.reading_flax.nnx_stacks import Stacks

Path = tuple[Any, ...]


def leaves_of(model: nnx.Module) -> list[Leaf]:
    """Reads the parameters of an NNX module, which may be abstract.

    Args:
        model: The module.

    Returns:
        Its parameters, in the order of its attributes. Floating variables of other types than
        `nnx.Param` (some `wrt` filter may select them) are among them if their layer is known.
    """
    nodes = dict(nnx.iter_graph(model))
    copies = _copies(model)
    modules = {
        alias: node
        for path, node in nodes.items()
        if isinstance(node, nnx.Module)
        for alias in _aliases(path, copies)
    }
    variables = {
        path: node
        for path, node in nodes.items()
        if isinstance(node, nnx.Variable) and _is_floating(node.get_value())
    }
    aliases = {path: _aliases(path, copies) for path in variables}
    roles = {path: _role(aliases[path], modules) for path in variables}
    stacks = Stacks(
        {path: role.inner for path, role in roles.items() if role is not None},
        {path: tuple(variable.get_value().shape) for path, variable in variables.items()},
        {path: _axis_names(variable) for path, variable in variables.items()},
    )
    attended = attending.attended(modules)
    return [
        _leaf(path, roles[path], stacks, modules, aliases[path], attended)
        for path, variable in variables.items()
        if roles[path] is not None or isinstance(variable, nnx.Param)
    ]


def _leaf(
    path: Path,
    role: Role | None,
    stacks: Stacks,
    modules: Mapping[Path, nnx.Module],
    aliases: list[Path],
    attended: frozenset[Path],
) -> Leaf:
    shape = stacks.shapes[path]
    layer = type(modules[_owner(path, modules)]).__name__
    paths = tuple(_joined(alias) for alias in aliases)
    if role is None and (inner := stacks.inner_of_stranger(path)) is not None:
        role = Role("vector", "o" * len(inner), inner)
    if role is None or role.problem:
        problem = role.problem if role is not None else ""
        return Leaf(paths, shape, "unknown", "", layer, problem=problem)
    try:
        axes = stacks.axes(path, role.inner)
    except ValueError as error:
        return Leaf(paths, shape, "unknown", "", layer, problem=str(error))
    layout = layouts.stacked(role.layout, axes, shape)
    tied = len(aliases) > 1 or path[:-1] in attended
    is_zero = role.start is jax.nn.initializers.zeros
    return Leaf(paths, shape, role.kind, layout, layer, tied, role.start, is_zero)


def _role(aliases: list[Path], modules: Mapping[Path, nnx.Module]) -> Role | None:
    """Asks the layers at all paths of a parameter."""
    roles: list[Role] = []
    for path in aliases:
        module, parent = modules.get(path[:-1]), modules.get(path[:-2])
        role = nnx_roles.role(module, path[-1], path[-2:-1], parent)
        role = role or nnx_roles.scale_of_weight_norm(path, modules)
        roles += [] if role is None else [role]
    # An embedding that is also something else is tied. Who knows of gates knows best.
    roles.sort(key=lambda role: (role.kind != "embedding", "[" not in role.layout))
    return roles[0] if roles else None


def _copies(model: nnx.Module) -> list[list[Path]]:
    """Lists the paths of what a model holds several times; not those that go in circles."""
    return [
        [
            path
            for path in group
            if not any(path != start and path[: len(start)] == start for start in group)
        ]
        for group in nnx.find_duplicates(model)
    ]


def _aliases(path: Path, copies: list[list[Path]]) -> list[Path]:
    """Lists all paths of a node, the given one first: it, or a module above it, may be shared."""
    found = [path]
    for known in found:  # grows meanwhile
        for group in copies:
            for start in group:
                if known[: len(start)] == start:
                    others = (other + known[len(start) :] for other in group)
                    found += [other for other in others if other not in found]
    return found


def _owner(path: Path, modules: Mapping[Path, nnx.Module]) -> Path:
    """Finds the innermost module around a path (lists and dictionaries are none)."""
    return next(path[:length] for length in range(len(path), -1, -1) if path[:length] in modules)


def _joined(path: Path) -> str:
    """Joins a path as `leaf_path` does."""
    keys = tuple(jax.tree_util.DictKey(key) for key in path)
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _is_floating(value: Any) -> bool:
    return hasattr(value, "shape") and jnp.issubdtype(value.dtype, jnp.floating)


def _axis_names(variable: nnx.Variable[Any]) -> tuple[Any, ...]:
    metadata = variable.get_metadata()
    # The second is what Flax before 0.12.4 calls it.
    names = metadata.get("out_sharding", metadata.get("sharding_names"))
    return tuple(names) if isinstance(names, tuple | list) else ()
