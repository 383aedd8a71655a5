"""Cases: trees of matrices and how they are split, as people train them.

The trees hold the matrices that are orthogonalized and nothing else (see block_trees.py). Leaves of
rank 3 are scanned layers or experts, `bio`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from benchmarks.block_trees import block_shapes

Shapes = dict[str, tuple[int, ...]]
P = PartitionSpec


@dataclass(frozen=True)
class Case:
    """A tree on a mesh.

    Attributes:
        shapes: The leaves, by path.
        topology: A TPU's, such as `v5e:2x4`; None for one v5e chip.
        mesh: Sizes of the mesh axes.
        split: How leaves are split.
        apart: Leaves, by the last part of their path, that are split in another way.
        kind: `Explicit` or `Auto`.
    """

    shapes: Shapes
    topology: str | None = None
    mesh: Mapping[str, int] = field(default_factory=lambda: {"fsdp": 1})
    split: PartitionSpec = P("fsdp", None)
    apart: Mapping[str, PartitionSpec] = field(default_factory=dict)
    kind: str = "Explicit"

    @property
    def tree(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes, in float32."""
        return {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in self.shapes.items()}

    @property
    def is_stacked(self) -> bool:
        """Whether leaves hold several matrices, along their first axis."""
        return any(len(shape) == 3 for shape in self.shapes.values())

    @property
    def matrices(self) -> list[jax.ShapeDtypeStruct]:
        """All matrices, one by one."""
        return [
            jax.ShapeDtypeStruct(shape[-2:], jnp.float32)
            for shape in self.shapes.values()
            for _ in range(math.prod(shape[:-2]))
        ]

    @property
    def splits(self) -> dict[str, PartitionSpec]:
        """How each leaf is split."""
        if not self.topology:
            return dict.fromkeys(self.shapes, P())
        return {path: self.apart.get(path.split("/")[-1], self.split) for path in self.shapes}


def blocks(layers: int, width: int) -> Shapes:
    """Lists the matrices of a GPT-2, a leaf each."""
    tree = block_shapes(layers, width)
    return {f"{layer}/{name}": x.shape for layer, xs in tree.items() for name, x in xs.items()}


def scanned(layers: int, width: int) -> Shapes:
    """Lists the matrices of a GPT-2, all layers in a leaf."""
    return {name: (layers, *x.shape) for name, x in block_shapes(1, width)["layer0"].items()}


def llama(layers: int, width: int, hidden: int, kv: int) -> Shapes:
    """Lists the matrices of a Llama, all layers in a leaf: grouped queries, gated units."""
    matrices = {"query": (width, width), "key": (width, kv), "value": (width, kv)}
    matrices |= {"output": (width, width), "gate": (width, hidden), "up": (width, hidden)}
    matrices |= {"down": (hidden, width)}
    return {name: (layers, *shape) for name, shape in matrices.items()}


_EIGHT = {"topology": "v5e:2x4", "mesh": {"fsdp": 8}}
_BOTH = {"topology": "v5e:2x4", "mesh": {"tensor": 4, "fsdp": 2}}
_SCANNED = P(None, "fsdp", None)
_BACK = P("tensor", "fsdp")
_EXPERTS = {"gate": (8, 1024, 4096), "up": (8, 1024, 4096), "down": (8, 4096, 1024)}


def _experts(expert: int, fsdp: int, kind: str) -> Case:
    mesh = {"expert": expert, "fsdp": fsdp}
    return Case(_EXPERTS, "v5e:2x4", mesh, P("expert", "fsdp", None), kind=kind)


def _large(layers: int, width: int, hidden: int, side: int = 8) -> Case:
    shapes, mesh = llama(layers, width, hidden, 1024), {"fsdp": side**2}
    return Case(shapes, f"v5e:{side}x{side}", mesh, _SCANNED)


CASES: dict[str, Case] = {
    "chip": Case(blocks(4, 768)),
    "fsdp": Case(blocks(12, 768), **_EIGHT),
    "fsdp-auto": Case(blocks(12, 768), **_EIGHT, kind="Auto"),
    "scanned": Case(scanned(12, 768), **_EIGHT, split=_SCANNED),
    "scanned-auto": Case(scanned(12, 768), **_EIGHT, split=_SCANNED, kind="Auto"),
    "scanned-1024": Case(scanned(24, 1024), **_EIGHT, split=_SCANNED),
    "llama": _large(32, 4096, 14336),
    "llama-12": _large(12, 4096, 14336),
    "llama-256": _large(32, 4096, 14336, side=16),
    "llama-80": _large(80, 8192, 28672),
    "both": Case(blocks(12, 768), **_BOTH, split=P("fsdp", "tensor")),
    "megatron": Case(
        blocks(12, 768),
        **_BOTH,
        split=P("fsdp", "tensor"),
        apart={"output": _BACK, "contract": _BACK},
    ),
    "megatron-auto": Case(
        blocks(12, 768),
        **_BOTH,
        split=P("fsdp", "tensor"),
        apart={"output": _BACK, "contract": _BACK},
        kind="Auto",
    ),
    "data-auto": Case(blocks(12, 768), "v5e:2x4", {"data": 2, "fsdp": 4}, kind="Auto"),
    "experts-2x4": _experts(2, 4, "Explicit"),
    "experts-4x2": _experts(4, 2, "Explicit"),
    "experts-2x4-auto": _experts(2, 4, "Auto"),
    "experts-4x2-auto": _experts(4, 2, "Auto"),
}
