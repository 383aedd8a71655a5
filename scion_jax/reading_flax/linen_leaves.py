"""Linen: a model's parameters, as its layers see them while it is initialized abstractly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import recurrent

from scion_jax.labels import leaf_path
from scion_jax.reading_flax import layouts
from scion_jax.reading_flax.layouts import Kind, Leaf, Shape, Start


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A parameter at the moment when its layer makes it: inside of every scan and vmap."""

    shape: Shape
    kind: Kind
    layout: str
    module: str
    draw: Callable[[jax.Array], Any]
    starts_at_zero: bool
    problem: str = ""


class _NoKey:
    """A key that adds nothing to a path: layers that name parameters by path see no box."""

    key = ""

    def __str__(self) -> str:
        return self.key


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass
class _Marked(nn.meta.AxisMetadata[Any]):
    """A box that lifted transformations tell where they put the axes of a stack."""

    value: Any
    stacked: tuple[bool, ...]

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[bool, ...]]:
        return ((_NoKey(), self.value),), self.stacked

    @classmethod
    def tree_unflatten(cls, stacked: tuple[bool, ...], values: tuple[Any]) -> _Marked:
        return cls(*values, stacked)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return _Marked(val, self.stacked)

    def add_axis(self, index: int, params: dict[Any, Any]) -> _Marked:
        del params
        axis = index if index >= 0 else index + len(self.stacked) + 1
        return _Marked(self.value, (*self.stacked[:axis], True, *self.stacked[axis:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> _Marked:
        del params
        axis = index if index >= 0 else index + len(self.stacked)
        return _Marked(self.value, self.stacked[:axis] + self.stacked[axis + 1 :])


def leaves_of(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Leaf]:
    """Reads the parameters of a Linen module.

    Args:
        model: The module.
        inputs: What its call takes, arrays or their shapes.
        kwargs: Keyword arguments of its call; `rngs`, `method` and `mutable` as in `init`.

    Returns:
        Its parameters, in the order in which they are made.
    """
    seen: dict[str, _Seen] = {}
    attended: set[str] = set()
    final = _shapes(_init(model, inputs, kwargs, seen, attended))
    places = {
        path: layouts.placements(seen[path].shape, shape)
        for path, shape in final.items()
        if path in seen
    }
    doubtful = {path for path, found in places.items() if len(found) > 1}
    if doubtful:
        boxed = _init(model, inputs, kwargs, {}, set(), doubtful)
        places |= {path: [axes] for path, axes in _marks(boxed).items()}
    order = [path for path in seen if path in final]
    order += [path for path in final if path not in seen]
    return [
        _leaf(path, final[path], seen.get(path), places.get(path, []), path in attended)
        for path in order
    ]


def _leaf(
    path: str, shape: Shape, seen: _Seen | None, places: list[tuple[int, ...]], tied: bool
) -> Leaf:
    if seen is None:
        return Leaf((path,), shape, "vector" if len(shape) < 2 else "unknown", "o", "?")
    if len(places) != 1:
        problem = f"its layer makes it of shape {seen.shape}"
        return Leaf((path,), shape, "unknown", "", seen.module, problem=problem)
    if seen.kind == "unknown":
        return Leaf((path,), shape, "unknown", "", seen.module, problem=seen.problem)
    axes = places[0]
    start = None
    if seen.kind == "vector":
        start = _start(path, seen.draw, axes)
    elif seen.starts_at_zero:
        start = jax.nn.initializers.zeros
    layout = layouts.stacked(seen.layout, axes, shape)
    return Leaf((path,), shape, seen.kind, layout, seen.module, tied, start)


def _start(path: str, draw: Callable[[jax.Array], Any], axes: tuple[int, ...]) -> Start:
    def start(key: jax.Array, shape: Shape, dtype: Any) -> jax.Array:
        sizes = tuple(shape[axis] for axis in axes)
        try:
            entries = jax.vmap(draw)(jax.random.split(key, math.prod(sizes)))
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                f"leaf '{path}' starts from the model's inputs; give its value, not its shape"
            ) from error
        value = entries.reshape(sizes + entries.shape[1:])
        return jnp.moveaxis(value, range(len(axes)), axes).astype(dtype)

    return start


def _init(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seen: dict[str, _Seen],
    attended: set[str],
    mark: set[str] | frozenset[str] = frozenset(),
) -> Any:
    """Initializes abstractly; fills `seen` and `attended`, and boxes the leaves in `mark`."""
    leaves, structure = jax.tree.flatten((inputs, dict(kwargs)))
    traced = [isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for leaf in leaves]
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key: jax.Array, arrays: list[Any]) -> Any:
        rest = iter(arrays)
        filled = [
            next(rest) if is_traced else leaf
            for leaf, is_traced in zip(leaves, traced, strict=True)
        ]
        inputs, kwargs = jax.tree.unflatten(structure, filled)
        rngs = kwargs.pop("rngs", {})
        rngs = {"params": key, **rngs} if isinstance(rngs, Mapping) else rngs
        return model.init(rngs, *inputs, **kwargs).get("params", {})

    arrays = [leaf for leaf, is_traced in zip(leaves, traced, strict=True) if is_traced]
    with _watching(seen, attended, mark):
        return jax.eval_shape(init, key, arrays)


@contextlib.contextmanager
def _watching(
    seen: dict[str, _Seen], attended: set[str], mark: set[str] | frozenset[str]
) -> Iterator[None]:
    """Notes what layers do while a model is initialized.

    `nn.Module.param` is replaced meanwhile, in this thread: interceptors do not see it, and nothing
    else knows layer, initializer and unstacked shape of a parameter, in every transformation.
    """
    original = nn.Module.param
    thread = threading.get_ident()
    equations: dict[tuple[str, ...], str | None] = {}

    @functools.wraps(original)
    def param(module: nn.Module, name: str, init_fn: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(module, name, init_fn, *args, **kwargs)
        path = "/".join((*module.path, name)).replace("//", "/")  # of _NoKey
        own = {k: v for k, v in kwargs.items() if k != "unbox"}
        draw = functools.partial(_draw, init_fn, args, own)

        def marked(*args: Any, **kwargs: Any) -> Any:
            value = init_fn(*args, **kwargs)
            return _Marked(value, (False,) * jnp.ndim(nn.meta.unbox(value)))

        value = original(module, name, marked if path in mark else init_fn, *args, **kwargs)
        value = value.value if isinstance(value, _Marked) else value
        for keys, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(value)):
            tail = f"/{leaf_path(keys)}" if keys else ""
            seen[path + tail] = _see(module, name, leaf, draw, init_fn, equations)
        return value

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.Embed) and context.method_name == "attend":
            attended.add("/".join((*module.path, "embedding")))
        if isinstance(module, nn.Einsum) and context.method_name == "__call__":
            called = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
            equations[module.path] = called or module.einsum_str
        return next_fun(*args, **kwargs)

    nn.Module.param = param  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        nn.Module.param = original


def _draw(init_fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], key: jax.Array) -> jax.Array:
    return jnp.asarray(nn.meta.unbox(init_fn(key, *args, **kwargs)))


def _see(
    module: nn.Module,
    name: str,
    array: jax.Array,
    draw: Callable[[jax.Array], Any],
    init_fn: Any,
    equations: Mapping[tuple[str, ...], str | None],
) -> _Seen:
    shape = tuple(array.shape)
    problem = ""
    try:
        kind, layout = _role(module, name, len(shape), equations.get(module.path))
    except ValueError as error:
        kind, layout, problem = "unknown", "", str(error)
    initializer = getattr(module, f"{name}_init", init_fn)
    starts_at_zero = inspect.unwrap(initializer) is jax.nn.initializers.zeros
    return _Seen(shape, kind, layout, type(module).__name__, draw, starts_at_zero, problem)


def _role(module: nn.Module, name: str, rank: int, equation: str | None) -> tuple[Kind, str]:
    """Says what a layer uses a parameter for, and its layout inside of the layer."""
    parent = module.parent
    gates = 4 if isinstance(parent, nn.ConvLSTMCell) and module.name in ("ih", "hh") else 1
    match module, name:
        case ((nn.Dense() | recurrent.DenseParams()), "kernel"):
            return "matrix", "io"
        case nn.DenseGeneral(), "kernel" | "bias":
            batch, outputs = (_length(n) for n in (module.batch_dims, module.features))
            if name == "bias":
                return "vector", layouts.general(batch, 0, outputs)
            return "matrix", layouts.general(batch, rank - batch - outputs, outputs)
        case nn.Einsum(), "kernel" | "bias":
            kind, kernel, bias = layouts.einsum(equation or "")
            return (kind, kernel) if name == "kernel" else ("vector", bias)
        case nn.ConvLocal(), "kernel":  # one matrix per position
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
        case (
            (nn.BatchNorm() | nn.LayerNorm() | nn.RMSNorm() | nn.GroupNorm() | nn.InstanceNorm()),
            "scale" | "bias",
        ):
            return "vector", "o" * rank
    return ("vector", "o" * rank) if rank < 2 else ("unknown", "")


def _length(sizes: Any) -> int:
    return len(sizes) if hasattr(sizes, "__len__") else 1


def _shapes(tree: Any) -> dict[str, Shape]:
    return {
        leaf_path(keys): tuple(leaf.shape)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(tree))
    }


def _marks(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, _Marked))
    return {
        leaf_path(keys).replace("//", "/"): tuple(
            axis for axis, is_stack in enumerate(leaf.stacked) if is_stack
        )
        for keys, leaf in leaves
        if isinstance(leaf, _Marked)
    }
