"""Assignments: the norm of every parameter of a program, as one value.

`infer_norms` reads them off a loss function. An assignment knows parameters by their paths, so it
serves whatever tree of them comes along: a state of NNX or a module, dictionaries with or without
`params`, boxed arrays, gradients, and trees in which leaves are missing, masked or None.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from scion_jax._labels import check_no_count
from scion_jax._paths import leaf_path, nearest, without_collection
from scion_jax.norms import Norm, Spectral, at_rank


@dataclasses.dataclass(frozen=True)
class Entry:
    """What one parameter is.

    Attributes:
        path: Where it stands in its tree, such as `"blocks/0/kernel"`.
        shape: Its shape.
        label: Its label; one that begins with `unused` says that no gradient reaches it.
        norm: Its norm, the same for all entries of a label.
        used_at: Where the program uses it, such as `"dot_general model.py:41"`.
    """

    path: str
    shape: tuple[int, ...]
    label: str
    norm: Norm
    used_at: tuple[str, ...] = ()

    @property
    def is_unused(self) -> bool:
        """Whether no gradient reaches it."""
        return re.match(r"unused\b", self.label) is not None


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The norms of a program's parameters: a value, to be given as `norms` wherever norms are.

    Optimizers, `init_params`, `describe` and the diagnostics take it alone, without labels. It can
    be hashed, compared and pickled, and holds nothing of a framework.

    Attributes:
        entries: One for each parameter.

    Raises:
        ValueError: If a path comes twice, or a label stands for two norms.

    Example:
        >>> import jax.numpy as jnp, optax, scion_jax
        >>> entry = Entry("head/kernel", (8, 2), "last", scion_jax.Sign(16.0, layout="io"))
        >>> assignment = Assignment((entry,))
        >>> params = {"head": {"kernel": jnp.ones((8, 2))}}
        >>> optimizer = scion_jax.scion(0.1, assignment)
        >>> routed = optax.multi_transform(
        ...     {label: scion_jax.scale_by_lmo(norm) for label, norm in assignment.norms.items()},
        ...     assignment.labels)
        >>> assignment.labels(params)
        {'head': {'kernel': 'last'}}
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        counts = collections.Counter(entry.path for entry in self.entries)
        if repeated := [path for path, count in counts.items() if count > 1]:
            raise ValueError(f"several entries have the path {', '.join(map(repr, repeated))}")
        norms = self.norms
        for label, norm in ((entry.label, entry.norm) for entry in self.entries):
            if norms[label] != norm:
                raise ValueError(
                    f"label {label!r} stands for {norms[label]} and for {norm}; give each norm a "
                    "label of its own"
                )

    @property
    def norms(self) -> dict[str, Norm]:
        """The norms by label."""
        return {entry.label: entry.norm for entry in self.entries}

    @property
    def labels(self) -> Labels:
        """A function from a tree to the tree of its labels, for `optax.multi_transform`."""
        return Labels(self)

    def muon_dimension_numbers(self, params: Any) -> Any:
        """Says in Optax's terms which matrices Muon is for.

        To be given as it is: `optax.contrib.muon(…, muon_weight_dimension_numbers=assignment
        .muon_dimension_numbers)`. Batch axes are neither of the two, windows count as inputs, and
        the parts of `io[3]`, for which there is no word, are one matrix.

        Args:
            params: Parameters, gradients, or their shapes.

        Returns:
            A tree of the same structure: `optax.contrib.MuonDimensionNumbers` for every matrix
            whose norm is `Spectral`, None for embeddings, the last layer, and vectors.

        Raises:
            ValueError: As `labels`.

        Example:
            >>> entry = Entry("query", (8, 4, 2), "hidden", Spectral(layout="ioo"))
            >>> Assignment((entry,)).muon_dimension_numbers({"query": jax.numpy.ones((8, 4, 2))})
            {'query': MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))}
        """
        import optax.contrib  # of which nothing else here has need

        def numbers(entry: Entry) -> optax.contrib.MuonDimensionNumbers | None:
            norm = at_rank(entry.norm, len(entry.shape))
            letters = re.sub(r"\[.*?\]", "", norm.read(entry.shape, f"leaf '{entry.path}'").text)
            inputs = tuple(axis for axis, letter in enumerate(letters) if letter in "is")
            outputs = tuple(axis for axis, letter in enumerate(letters) if letter == "o")
            if not (inputs and isinstance(norm, Spectral)) or entry.is_unused:
                return None
            return optax.contrib.MuonDimensionNumbers(inputs, outputs)

        return self.map(numbers, params)

    def map(self, function: Callable[[Entry], Any], tree: Any) -> Any:
        """Puts something of its entry in the place of every leaf.

        Args:
            function: What to put there.
            tree: Parameters, gradients, or their shapes; any part of them.

        Returns:
            A tree of the same structure.

        Raises:
            TypeError: If the tree is the count that schedules get.
            ValueError: If the program has no such parameter, or it has another shape; or if the
                tree holds other collections beside `"params"`.
        """
        check_no_count(tree, "the labels of an Assignment")
        self._check_collections(tree)
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: function(self._entry(keys, leaf)), tree
        )

    @functools.cached_property
    def _known(self) -> dict[str, Entry]:
        return {entry.path: entry for entry in self.entries}

    def _entry(self, keys: Sequence[Any], leaf: Any) -> Entry:
        path = leaf_path(keys)
        for known in (path, without_collection(path), f"params/{path}"):
            if known in self._known:
                self._check_shape(path, leaf, self._known[known].shape)
                return self._known[known]
        closest = nearest(path, self._known)
        raise ValueError(
            f"leaf '{path}' is no parameter of the program that the norms were read off"
            + (f" (the nearest is '{closest}')" if closest else "")
            + "; read the loss that is trained, and give the optimizer its parameters only, such "
            "as nnx.state(model, nnx.Param) or variables['params']"
        )

    def _check_shape(self, path: str, leaf: Any, shape: tuple[int, ...]) -> None:
        # Inside of shard_map each device sees its part only.
        if jax.sharding.get_abstract_mesh().manual_axes or not hasattr(leaf, "shape"):
            return
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"leaf '{path}' has shape {tuple(leaf.shape)}, but {shape} in the program that the "
                "norms were read off; read the loss that is trained"
            )

    def _check_collections(self, tree: Any) -> None:
        collections = list(tree) if isinstance(tree, Mapping) and "params" in tree else []
        if len(collections) > 1 and not any(path.startswith("params/") for path in self._known):
            others = ", ".join(repr(str(name)) for name in collections if name != "params")
            raise ValueError(
                f"beside 'params' there is {others}; the optimizer updates parameters only: give "
                "it variables['params']"
            )


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of an assignment: a function from a tree to the tree of its labels.

    Attributes:
        assignment: Whose labels they are.
    """

    assignment: Assignment

    def __call__(self, tree: Any) -> Any:
        """Labels every leaf; see `Assignment.map`."""
        return self.assignment.map(lambda entry: entry.label, tree)
