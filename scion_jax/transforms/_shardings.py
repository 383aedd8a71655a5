"""How parameters are split, said where their types do not say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from scion_jax._paths import leaf_path


def with_shardings(
    optimizer: optax.GradientTransformation, shardings: Any
) -> optax.GradientTransformationExtraArgs:
    """Tells an optimizer how parameters are split over Auto mesh axes.

    Types say nothing about Auto axes, so that an optimizer can only ask the compiler to move
    matrices. During this update the axes are Explicit, and only what has to moves. Parameters,
    gradients and whatever the state holds for each parameter are split alike, the rest of the state
    is the same on all devices. On Explicit axes it changes nothing.

    Args:
        optimizer: Any Optax transformation.
        shardings: A tree with the paths of the parameters', or a prefix of one, of `NamedSharding`
            or `PartitionSpec`, such as `jax.tree.map(lambda x: x.sharding, params)` of arrays, or
            what `nnx.get_partition_spec` returns.

    Returns:
        The same optimizer, told so.

    Raises:
        TypeError: If a leaf of `shardings` is neither of the two.
        ValueError: At `update`, if a parameter has no sharding, or one of more axes than it has, or
            if there is no mesh: neither one in force nor a `NamedSharding`'s.

    Example:
        >>> import scion_jax
        >>> from jax.sharding import AxisType, PartitionSpec
        >>> mesh = jax.make_mesh((1,), ("fsdp",), (AxisType.Auto,))
        >>> optimizer = with_shardings(scion_jax.scion(2**-6), PartitionSpec("fsdp", None))
        >>> params = {"w": jax.numpy.eye(2)}
        >>> with jax.set_mesh(mesh):
        ...     state = optimizer.init(params)
        ...     updates, state = jax.jit(optimizer.update)(params, state, params)
        >>> updates["w"].shape
        (2, 2)
    """
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    for _, leaf in leaves:
        if not isinstance(leaf, NamedSharding | PartitionSpec):
            raise TypeError(
                f"shardings holds {leaf!r}; each leaf is a PartitionSpec or a NamedSharding, such "
                "as jax.tree.map(lambda x: x.sharding, params) of arrays on a mesh"
            )
    meshes = [leaf.mesh.abstract_mesh for _, leaf in leaves if isinstance(leaf, NamedSharding)]
    by_path = {leaf_path(keys): getattr(leaf, "spec", leaf) for keys, leaf in leaves}

    def spec_of(keys: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = leaf_path(keys).split("/")
        prefixes = ["/".join(names[:length]) for length in range(len(names), -1, -1)]
        found = [by_path[prefix] for prefix in prefixes if prefix in by_path]
        if not found:
            raise ValueError(
                f"shardings says nothing of {prefixes[0]!r}, of shape {leaf.shape}; it has "
                f"{', '.join(map(repr, by_path))}. A PartitionSpec() says that it is not split"
            )
        if len(found[0]) > leaf.ndim:
            raise ValueError(
                f"shardings has {found[0]} for {prefixes[0]!r}, of shape {leaf.shape}; give it one "
                "with as many entries as it has axes, or PartitionSpec() if it is not split"
            )
        return found[0]

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        in_force = jax.sharding.get_abstract_mesh()
        if in_force.empty and not meshes:
            raise ValueError(
                "with_shardings finds no mesh; call the optimizer under jax.set_mesh(mesh), or "
                "give it NamedShardings, which know theirs"
            )
        mesh = meshes[0] if in_force.empty else in_force
        inner = optax.with_extra_args_support(optimizer).update
        if not mesh.auto_axes:
            return inner(updates, state, params, **extra)
        of_params = jax.tree_util.tree_map_with_path(spec_of, updates)
        of_state = optax.tree.map_params(
            optimizer,
            lambda value, spec: value if _is_masked(value) else spec,
            state,
            of_params,
            transform_non_params=lambda _: PartitionSpec(),
            is_leaf=_is_masked,
        )
        explicit: Callable[..., Any] = jax.sharding.explicit_axes(
            lambda *args: inner(*args, **extra),
            axes=mesh.auto_axes,
            in_sharding=(of_params, of_state, None if params is None else of_params),
        )
        with jax.sharding.use_abstract_mesh(mesh):
            return explicit(updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _is_masked(value: Any) -> bool:
    return isinstance(value, optax.MaskedNode)
