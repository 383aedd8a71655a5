"""Labels of a model that has been read: a callable for `param_labels`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from scion_jax.labels import leaf_path, nearest, without_collection
from scion_jax.reading_flax.layouts import Shape, Start


@dataclasses.dataclass(frozen=True)
class FlaxLabels:
    """Labels the parameters of one model, in whatever tree they come.

    It fits `nnx.state(model, nnx.Param)`, the arrays that `nnx.Optimizer` passes on, Linen's
    variables with and without `"params"`, boxed parameters, shapes, and trees in which leaves are
    missing, masked or None. Two of them are equal if they label equally.

    Attributes:
        leaves: Path, shape and label of every parameter, aliases included.
        starts: How the model starts some of them.
    """

    leaves: tuple[tuple[str, Shape, str], ...]
    starts: tuple[tuple[str, Start], ...] = dataclasses.field(compare=False, repr=False)

    @functools.cached_property
    def _known(self) -> dict[str, tuple[Shape, str]]:
        return {path: (shape, label) for path, shape, label in self.leaves}

    def __call__(self, tree: Any) -> Any:
        """Labels a tree.

        Args:
            tree: Parameters, gradients, or their shapes.

        Returns:
            A tree of the same structure, with a label at every leaf.

        Raises:
            ValueError: If the model has no such leaf, or it has another shape; or if the tree holds
                other collections beside `"params"`.
        """
        collections = list(tree) if isinstance(tree, Mapping) and "params" in tree else []
        if len(collections) > 1 and not any(p.startswith("params/") for p in self._known):
            others = ", ".join(repr(str(name)) for name in collections if name != "params")
            raise ValueError(
                f"beside 'params' there is {others}; the optimizer updates parameters only: give "
                "it variables['params']"
            )
        return jax.tree_util.tree_map_with_path(self._label, tree)

    def start_of(self, path: str) -> Start | None:
        """Finds how the model starts a parameter.

        Args:
            path: Path of the leaf, as `leaf_path` gives it, without `params/`.

        Returns:
            For a vector its initializer, `(key, shape, dtype) → array`, if it is known. For a
            matrix zeros if the model starts it there on purpose, as LoRA does. Otherwise None.
        """
        return dict(self.starts).get(path)

    def _label(self, keys: Sequence[Any], leaf: Any) -> str:
        path = leaf_path(keys)
        found = self._known.get(path)
        for shorter in (without_collection(path), path.removesuffix("/value")):
            found = found or self._known.get(shorter)
        if found is None:
            closest = nearest(path, self._known)
            raise ValueError(
                f"leaf '{path}' is no parameter of the model that flax_norms has read"
                + (f" (the nearest is '{closest}')" if closest else "")
                + "; read this model, and give the optimizer its parameters only, such as "
                "nnx.state(model, nnx.Param) or variables['params']"
            )
        shape, label = found
        if hasattr(leaf, "shape") and tuple(leaf.shape) != shape:
            raise ValueError(
                f"leaf '{path}' has shape {tuple(leaf.shape)}, but {shape} in the model that "
                "flax_norms has read; read the model that is trained"
            )
        return label
