"""NNX: a model's parameters, found by walking over its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from scion_jax.reading_flax import attending, layouts, nnx_stacks
from scion_jax.reading_flax.layouts import Kind, Leaf, Start

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Role:
    """What a layer uses a parameter for.

    Attributes:
        kind: As in `Leaf`.
        layout: Its layout inside of the layer, without axes of a stack.
        inner: Its shape there; None for a size that the layer does not know.
        start: As in `Leaf`.
        problem: As in `Leaf`.
    """

    kind: Kind
    layout: str
    inner: tuple[int | None, ...]
    start: Start | None = None
    problem: str = ""


def leaves_of(model: nnx.Module) -> list[Leaf]:
    """Reads the parameters of an NNX module, which may be abstract.

    Args:
        model: The module.

    Returns:
        Its parameters, in the order of its attributes. Other variables that are floating (those of
        a type that some user's `wrt` filter selects) are among them if their layer is known.
    """
    nodes = dict(nnx.iter_graph(model))
    modules = {path: node for path, node in nodes.items() if isinstance(node, nnx.Module)}
    copies = [[tuple(path) for path in group] for group in nnx.find_duplicates(model)]
    known: dict[Path, Role] = {}
    variables: dict[Path, Any] = {}
    for path, variable in nodes.items():
        value = variable.get_value() if isinstance(variable, nnx.Variable) else None
        if not hasattr(value, "shape") or not jax.dtypes.issubdtype(
            value.dtype, jax.numpy.floating
        ):
            continue
        role = _role_of(path, modules, copies)
        if role is not None:
            known[path] = role
        if role is not None or isinstance(variable, nnx.Param):
            variables[path] = variable
    shapes = {path: tuple(variable.get_value().shape) for path, variable in variables.items()}
    names = {path: _axis_names(variable) for path, variable in variables.items()}
    stacks = nnx_stacks.Stacks({path: role.inner for path, role in known.items()}, shapes, names)
    attended = attending.attended(modules)
    return [
        _leaf(path, shapes[path], known.get(path), stacks, modules, copies, attended)
        for path in variables
    ]


def _leaf(
    path: Path,
    shape: layouts.Shape,
    role: Role | None,
    stacks: nnx_stacks.Stacks,
    modules: dict[Path, nnx.Module],
    copies: list[list[Path]],
    attended: frozenset[Path],
) -> Leaf:
    owner = _owner(path, modules)
    name = type(modules[owner]).__name__
    aliases = _aliases(path, copies)
    paths = tuple(joined(alias) for alias in aliases)
    if role is None:
        inner = stacks.inner_of_stranger(path)
        if inner is None:
            return Leaf(paths, shape, "unknown", "", name)
        role = Role("vector", "o" * len(inner), inner)
    if role.problem:
        return Leaf(paths, shape, "unknown", "", name, problem=role.problem)
    try:
        axes = stacks.axes(path, role.inner)
    except ValueError as error:
        return Leaf(paths, shape, "unknown", "", name, problem=str(error))
    layout = layouts.stacked(role.layout, axes, shape)
    tied = len(aliases) > 1 or any(alias[:-1] in attended for alias in aliases)
    return Leaf(paths, shape, role.kind, layout, name, tied, role.start)


def joined(path: Path) -> str:
    """Joins a path as `leaf_path` does."""
    keys = tuple(jax.tree_util.DictKey(key) for key in path)
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _owner(path: Path, modules: dict[Path, nnx.Module]) -> Path:
    """Finds the innermost module around a path (lists and dictionaries are none)."""
    for length in range(len(path) - 1, -1, -1):
        if path[:length] in modules:
            return path[:length]
    raise ValueError(f"{path} is in no module")


def _aliases(path: Path, copies: list[list[Path]]) -> list[Path]:
    """Lists all paths of a parameter, the given one first: it, or a module above, may be shared."""
    found = [path]
    for known in found:  # grows meanwhile
        for group in copies:
            for start in group:
                if known[: len(start)] == start:
                    others = (other + known[len(start) :] for other in group)
                    found += [other for other in others if other not in found]
    return found


def _role_of(path: Path, modules: dict[Path, nnx.Module], copies: list[list[Path]]) -> Role | None:
    """Asks the layers at all paths of a parameter; an embedding speaks first."""
    roles: list[Role] = []
    for alias in _aliases(path, copies):
        # A module is listed once, under one of its paths.
        for owner in _aliases(alias[:-1], copies):
            if (module := modules.get(owner)) is not None:
                parents = [modules.get(p[:-1]) for p in _aliases(owner, copies)]
                role = _role(module, alias[-1], owner, [p for p in parents if p is not None])
                roles += [role] if role is not None else []
                break
    roles.sort(key=lambda role: role.kind != "embedding")
    return roles[0] if roles else _scale_of_weight_norm(path, modules)


def _scale_of_weight_norm(path: Path, modules: dict[Path, nnx.Module]) -> Role | None:
    module = modules.get(path[:-2])
    if not (isinstance(module, nnx.WeightNorm) and path[-2] == "scales"):
        return None
    features = module.feature_axes
    count = len(features) if isinstance(features, tuple | list) else 1
    return Role("vector", "o" * count, (None,) * count, module.scale_init)


def _role(module: nnx.Module, name: Any, path: Path, parents: list[nnx.Module]) -> Role | None:
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    match module, name:
        case nnx.Linear(), "kernel":
            layout = layouts.fused("io", _gates(path, parents))
            return Role("matrix", layout, (module.in_features, module.out_features))
        case nnx.Linear(), "bias":
            layout = layouts.fused("o", _gates(path, parents))
            return Role("vector", layout, (module.out_features,), zeros)
        case nnx.LinearGeneral(), "kernel" | "bias":
            batch = tuple(module.batch_axis.values())
            inputs, outputs = tuple(module.in_features), tuple(module.out_features)
            if name == "bias":
                layout = layouts.general(len(batch), 0, len(outputs))
                return Role("vector", layout, batch + outputs, zeros)
            layout = layouts.general(len(batch), len(inputs), len(outputs))
            return Role("matrix", layout, batch + inputs + outputs)
        case nnx.Einsum(), "kernel" | "bias":
            return _einsum(module, name)
        case nnx.Conv(), "kernel":
            inner = tuple(module.kernel_shape)
            layout = layouts.convolution(len(inner), module.feature_group_count)
            return Role("matrix", layout, inner)
        case nnx.ConvTranspose(), "kernel":
            inner = tuple(module.kernel_shape)
            layout = layouts.convolution(len(inner), transpose_kernel=module.transpose_kernel)
            return Role("matrix", layout, inner)
        case ((nnx.Conv() | nnx.ConvTranspose()), "bias"):
            return Role("vector", "o", (module.out_features,), zeros)
        case nnx.Embed(), "embedding":
            return Role("embedding", "io", (module.num_embeddings, module.features))
        case nnx.LoRA(), "lora_a":
            return Role("matrix", "io", (module.in_features, None))
        case nnx.LoRA(), "lora_b":
            return Role("matrix", "io", (None, module.out_features), zeros)
        case (
            (
                nnx.BatchNorm()
                | nnx.LayerNorm()
                | nnx.RMSNorm()
                | nnx.GroupNorm()
                | nnx.InstanceNorm()
            ),
            "scale" | "bias",
        ):
            return Role("vector", "o", (module.num_features,), ones if name == "scale" else zeros)
        case nnx.PReLU(), "negative_slope":
            return Role("vector", "", ())
    return None


def _gates(path: Path, parents: list[nnx.Module]) -> int:
    """Counts the gates that share a layer, which only the cell around it knows."""
    if path and path[-1] in ("dense_i", "dense_h"):
        if any(isinstance(parent, nnx.OptimizedLSTMCell) for parent in parents):
            return 4
        if any(isinstance(parent, nnx.GRUCell) for parent in parents):
            return 3
    return 1


def _einsum(module: nnx.Einsum, name: str) -> Role:
    inner = tuple(module.kernel_shape if name == "kernel" else module.bias_shape or ())
    try:
        kind, kernel, bias = layouts.einsum(module.einsum_str)
    except ValueError as error:
        return Role("unknown", "", inner, problem=str(error))
    if name == "kernel":
        return Role(kind, kernel, inner)
    return Role("vector", bias[-len(inner) :], inner, jax.nn.initializers.zeros)


def _axis_names(variable: Any) -> tuple[Any, ...]:
    names = variable.get_metadata().get("out_sharding")
    return tuple(names) if isinstance(names, tuple | list) else ()


def iter_paths(leaves: list[Leaf]) -> Iterator[tuple[str, Leaf]]:
    """Goes over all paths of all leaves."""
    return ((path, leaf) for leaf in leaves for path in leaf.paths)
