"""Linen: watching layers make their parameters, while a model is initialized abstractly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from scion_jax.labels import leaf_path
from scion_jax.reading_flax import linen_roles
from scion_jax.reading_flax.layouts import Kind, Shape


@dataclasses.dataclass(frozen=True)
class Seen:
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
class Marked(nn.meta.AxisMetadata[Any]):
    """A box that lifted transformations tell where they put the axes of a stack."""

    value: Any
    stacked: tuple[bool, ...]

    def tree_flatten_with_keys(self) -> tuple[Any, tuple[bool, ...]]:
        return ((_NoKey(), self.value),), self.stacked

    @classmethod
    def tree_unflatten(cls, stacked: tuple[bool, ...], values: tuple[Any]) -> Marked:
        return cls(*values, stacked)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return Marked(val, self.stacked)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Marked:
        del params
        axis = index if index >= 0 else index + len(self.stacked) + 1
        return Marked(self.value, (*self.stacked[:axis], True, *self.stacked[axis:]))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Marked:
        del params
        axis = index if index >= 0 else index + len(self.stacked)
        return Marked(self.value, self.stacked[:axis] + self.stacked[axis + 1 :])


def initialize(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seen: dict[str, Seen],
    attended: set[str],
    mark: Set[str] = frozenset(),
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
def _watching(seen: dict[str, Seen], attended: set[str], mark: Set[str]) -> Iterator[None]:
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
            return Marked(value, (False,) * jnp.ndim(nn.meta.unbox(value)))

        value = original(module, name, marked if path in mark else init_fn, *args, **kwargs)
        value = value.value if isinstance(value, Marked) else value
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
) -> Seen:
    shape = tuple(array.shape)
    problem = ""
    try:
        kind, layout = linen_roles.role(module, name, len(shape), equations.get(module.path))
    except ValueError as error:
        kind, layout, problem = "unknown", "", str(error)
    initializer = getattr(module, f"{name}_init", init_fn)
    starts_at_zero = inspect.unwrap(initializer) is jax.nn.initializers.zeros
    return Seen(shape, kind, layout, type(module).__name__, draw, starts_at_zero, problem)


def axes_of_stacks(tree: Any) -> dict[str, tuple[int, ...]]:
    """Finds where stacks have their axes.

    Args:
        tree: What `initialize` returned, with boxes.

    Returns:
        The axes of every leaf that is in a box, by its path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Marked))
    return {
        leaf_path(keys).replace("//", "/"): tuple(
            axis for axis, is_stack in enumerate(leaf.stacked) if is_stack
        )
        for keys, leaf in leaves
        if isinstance(leaf, Marked)
    }
