"""Linen: what each layer uses its parameters for."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from flax.linen import recurrent

from scion_jax.reading_flax import layouts
from scion_jax.reading_flax.layouts import Kind

_NORM_LAYERS = (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)


def role(module: nn.Module, name: str, rank: int, equation: str | None) -> tuple[Kind, str]:
    """Says what a layer uses a parameter for.

    Args:
        module: The layer.
        name: Name of the parameter.
        rank: Its number of axes inside of the layer.
        equation: What an `Einsum` was called with.

    Returns:
        The kind, and the layout inside of the layer.

    Raises:
        ValueError: If the equation does not tell.
    """
    # The convolutions of this cell compute four gates at once; they do not know.
    gates = 4 if isinstance(module.parent, nn.ConvLSTMCell) and module.name in ("ih", "hh") else 1
    match module, name:
        case ((nn.Dense() | recurrent.DenseParams()), "kernel"):
            return "matrix", "io"
        case nn.DenseGeneral(), "kernel" | "bias":
            batch, outputs = _length(module.batch_dims), _length(module.features)
            if name == "bias":
                return "vector", layouts.general(batch, 0, outputs)
            return "matrix", layouts.general(batch, rank - batch - outputs, outputs)
        case nn.Einsum(), "kernel" | "bias":
            kind, kernel, bias = layouts.einsum(equation or "")
            return (kind, kernel) if name == "kernel" else ("vector", bias)
        case nn.ConvLocal(), "kernel":  # a matrix for each position
            return "matrix", "b" * (rank - 2) + "io"
        case nn.ConvLocal(), "bias":
            return "vector", "b" * (rank - 1) + "o"
        case nn.Conv(), "kernel":
            return "matrix", layouts.convolution(rank, module.feature_group_count * gates)
        case nn.Conv(), "bias":
            return "vector", layouts.fused("o", gates)
        case nn.ConvTranspose(), "kernel":
            return "matrix", layouts.convolution(rank, transpose_kernel=module.transpose_kernel)
        case nn.Embed(), "embedding":
            return "embedding", "io"
    if rank < 2 or (isinstance(module, _NORM_LAYERS) and name in ("scale", "bias")):
        return "vector", "o" * rank
    return "unknown", ""


def _length(sizes: Any) -> int:
    return len(sizes) if hasattr(sizes, "__len__") else 1
