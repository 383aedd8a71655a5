"""NNX: what each layer uses its parameters for, and their shapes outside of any stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from scion_jax.reading_flax import layouts
from scion_jax.reading_flax.layouts import Kind, Start

_NORM_LAYERS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


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


def role(module: Any, name: Any, attribute: tuple[Any, ...], parent: Any) -> Role | None:
    """Says what a layer uses a parameter for.

    Args:
        module: The layer.
        name: Name of the parameter.
        attribute: Name of the layer in its parent; empty without a parent.
        parent: The module that holds the layer, or None.

    Returns:
        The role; None if Flax does not provide the layer, or the parameter is not the layer's own.
    """
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    gates = _gates(attribute, parent)
    match module, name:
        case nnx.Linear(), "kernel":
            inner = (module.in_features, module.out_features)
            return Role("matrix", layouts.fused("io", gates), inner)
        case nnx.Linear(), "bias":
            return Role("vector", layouts.fused("o", gates), (module.out_features,), zeros)
        case nnx.LinearGeneral(), "kernel" | "bias":
            batch = tuple(module.batch_axis.values())
            inputs = tuple(module.in_features) if name == "kernel" else ()
            outputs = tuple(module.out_features)
            layout = layouts.general(len(batch), len(inputs), len(outputs))
            if name == "bias":
                return Role("vector", layout, batch + outputs, zeros)
            return Role("matrix", layout, batch + inputs + outputs)
        case nnx.Einsum(), "kernel" | "bias":
            return _einsum(module, name)
        case nnx.Conv(), "kernel":
            rank, groups = len(module.kernel_shape), module.feature_group_count
            return Role("matrix", layouts.convolution(rank, groups), tuple(module.kernel_shape))
        case nnx.ConvTranspose(), "kernel":
            rank, transposed = len(module.kernel_shape), module.transpose_kernel
            layout = layouts.convolution(rank, transpose_kernel=transposed)
            return Role("matrix", layout, tuple(module.kernel_shape))
        case ((nnx.Conv() | nnx.ConvTranspose()), "bias"):
            return Role("vector", "o", (module.out_features,), zeros)
        case nnx.Embed(), "embedding":
            return Role("embedding", "io", (module.num_embeddings, module.features))
        case nnx.LoRA(), "lora_a":
            return Role("matrix", "io", (module.in_features, None))
        case nnx.LoRA(), "lora_b":
            return Role("matrix", "io", (None, module.out_features), zeros)
        case nnx.PReLU(), "negative_slope":
            return Role("vector", "", ())
    if isinstance(module, _NORM_LAYERS) and name in ("scale", "bias"):
        return Role("vector", "o", (_features(module),), ones if name == "scale" else zeros)
    return None


def scale_of_weight_norm(path: tuple[Any, ...], modules: Mapping[Any, nnx.Module]) -> Role | None:
    """Says what a parameter is if `WeightNorm` made it, for a parameter of another layer.

    Args:
        path: Path of the parameter.
        modules: The modules of the model, by their paths.

    Returns:
        The role, or None.
    """
    module = modules.get(path[:-2])
    if not (isinstance(module, nnx.WeightNorm) and path[-2] == "scales"):
        return None
    features = module.feature_axes
    count = len(features) if isinstance(features, tuple | list) else 1
    return Role("vector", "o" * count, (None,) * count, module.scale_init)


def _gates(attribute: tuple[Any, ...], parent: Any) -> int:
    """Counts the gates that a layer computes at once, which only the cell around it knows."""
    if attribute in (("dense_i",), ("dense_h",)):
        if isinstance(parent, nnx.OptimizedLSTMCell):
            return 4
        if isinstance(parent, nnx.GRUCell):
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
    return Role("vector", bias, inner, jax.nn.initializers.zeros)


def _features(module: Any) -> int:
    if isinstance(module, nnx.GroupNorm):
        return module.num_groups * module.group_size
    return module.num_features
