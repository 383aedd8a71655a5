"""A run on several devices: the mesh, and how parameters, optimizer state and batches lie on it.

The mesh has three axes: ``data`` and ``fsdp`` split the batch; ``fsdp`` also splits every matrix
along one axis and ``tensor`` along the other. XLA inserts the communication that follows from that.
`placement` and `split_batch` ask JAX for the current mesh, and do nothing where there is none.
"""

import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from gpt_settings import MESH_AXES, InputError

BATCH_AXES = ("data", "fsdp")

# Over which mesh axes the two axes of a matrix are split, by the end of its path. Each half of a
# block first splits its activations over ``tensor`` by columns and then adds them up by rows, as in
# Megatron, so that it needs one sum over ``tensor``. The embedding keeps its rows whole: so a token
# is looked up in one place, and the column norm needs no communication.
FSDP, TENSOR, WHOLE = ("fsdp",), ("tensor",), ()
RULES = (
    (r"(query|key|value|expand)/kernel$", (FSDP, TENSOR)),
    (r"(output|contract)/kernel$", (TENSOR, FSDP)),
    (r"embedding/embedding$", (FSDP + TENSOR, WHOLE)),  # (vocabulary, width)
    (r"head/kernel$", (FSDP, TENSOR)),  # (width, vocabulary)
)


def simulate_devices(count: int) -> None:
    """Has JAX use the CPU, split into ``count`` devices.

    Args:
        count: The number of devices; 0 leaves JAX as it is.

    Raises:
        InputError: If JAX has opened its devices already, since it does that once.
    """
    if not count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise InputError(
            f"--fake-devices {count} comes too late: JAX has opened its devices already"
        ) from error
    jax.config.update("jax_platforms", "cpu")


def make_mesh(sizes: Mapping[str, int] | None) -> Mesh | None:
    """Makes a mesh of the first devices.

    Args:
        sizes: Axis sizes as `parse_mesh` reads them; None asks for no mesh.

    Returns:
        The mesh, of all of `MESH_AXES`, or None.

    Raises:
        InputError: If there are fewer devices than it needs.
    """
    if sizes is None:
        return None
    count, devices = math.prod(sizes.values()), jax.devices()
    if count > len(devices):
        asked = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(
            f"--mesh {asked} is of {count} devices, but here are {len(devices)}: take a smaller "
            f"mesh, or try this one on the CPU with --fake-devices {count}"
        )
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, kinds, devices=devices[:count])


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Returns a context within which the mesh is the current one."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def describe(mesh: Mesh) -> str:
    """Returns a line about the mesh."""
    sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return f"mesh {sizes}: {mesh.size} of {jax.device_count()} devices ({kind})"


def spread_axes(sizes: Mapping[str, int] | None) -> tuple[str, ...] | None:
    """Returns the mesh axes over which the LMOs of a step are shared out.

    Args:
        sizes: Axis sizes as `parse_mesh` reads them; None if there is no mesh.

    Returns:
        All with more than one device, so that no two devices make the same LMO; None if there is no
        such axis.
    """
    return tuple(name for name, size in (sizes or {}).items() if size > 1) or None


def current_sizes() -> Mapping[str, int]:
    """Returns the axis sizes of the current mesh; nothing if there is none."""
    return jax.sharding.get_abstract_mesh().shape


def placement(tree: Any) -> Any:
    """Returns how parameters or an optimizer's state lie on the current mesh.

    A buffer of an optimizer has the path of its parameter at the end of its own, and so lies as its
    parameter does.

    Args:
        tree: Arrays, or what `jax.eval_shape` returns for them.

    Returns:
        A tree of partition specs, or None if there is no mesh. A mesh axis that does not divide an
        axis of an array does not split it.
    """
    sizes = current_sizes()
    if not sizes:
        return None

    def dividing(axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
        kept: tuple[str, ...] = ()
        for axis in axes:
            if size % math.prod(sizes[name] for name in (*kept, axis)) == 0:
                kept += (axis,)
        return kept or None

    def spec(path: jax.tree_util.KeyPath, leaf: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in RULES if re.search(pattern, name)), ())
        if len(axes) != leaf.ndim:
            return PartitionSpec()  # a count or the like
        return PartitionSpec(*map(dividing, axes, leaf.shape))

    return jax.tree_util.tree_map_with_path(spec, tree)


def split_batch(x: Any) -> Any:
    """Keeps the first axis of ``x`` split over the current mesh, and the others whole.

    Between layers this makes XLA gather the parameters that ``fsdp`` splits, not the activations.

    Args:
        x: Tokens or activations. A batch that the mesh does not divide, such as the one sequence of
            a sample, is left to XLA.

    Returns:
        The same array.
    """
    sizes = current_sizes()
    if not sizes or x.shape[0] % math.prod(sizes[name] for name in BATCH_AXES):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))
