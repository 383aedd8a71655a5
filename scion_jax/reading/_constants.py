"""Constants: what is known of arrays that come of neither parameters nor inputs.

Two things matter: the value of an index, so that `kernel[2]` is a place and not somewhere; and
along which axis an array counts, so that data equal to it is one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np

from scion_jax.reading._values import Constant

_LARGEST = 64


def constant(array: Any) -> Constant:
    """Looks at an array: small ones of whole numbers may be indices."""
    if isinstance(array, float | jax.core.Tracer) or np.size(array) > _LARGEST:
        return Constant()
    dtype = getattr(array, "dtype", None)
    counts = isinstance(array, int) or (dtype is not None and jnp.issubdtype(dtype, np.integer))
    return Constant(np.asarray(array)) if counts else Constant()


def fold(equation: Any, values: Sequence[Constant]) -> list[Constant]:
    """Follows an operation on constants."""
    name, params, shape = (
        equation.primitive.name, equation.params, equation.outvars[0].aval.shape,
    )  # fmt: skip
    known = [value.value for value in values]
    small = math.prod(shape) <= _LARGEST and all(value is not None for value in known)
    value = np.asarray(_FOLDED[name](params, *known)) if small and name in _FOLDED else None
    iota: tuple[int, ...] = ()
    counting = [value.iota for value in values if value.iota]
    if name == "iota":
        iota = (params["dimension"],)
    elif name == "broadcast_in_dim":
        iota = tuple(params["broadcast_dimensions"][axis] for axis in values[0].iota)
    elif name == "convert_element_type" or (name in ("add", "sub") and len(counting) == 1):
        iota = counting[0] if counting else ()
    elif name == "eq" and len(counting) == 2 and counting[0] != counting[1]:
        iota = counting[0] + counting[1]  # an identity matrix
    return [Constant(value, iota)] * len(equation.outvars)


def _broadcast(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape, places = params["shape"], params["broadcast_dimensions"]
    wide = [x.shape[places.index(d)] if d in places else 1 for d in range(len(shape))]
    return np.broadcast_to(x.reshape(wide), shape)


def _slice(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    steps = params["strides"] or (1,) * x.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


_FOLDED: Mapping[str, Callable[..., Any]] = {
    "add": lambda p, x, y: x + y,
    "sub": lambda p, x, y: x - y,
    "mul": lambda p, x, y: x * y,
    "lt": lambda p, x, y: x < y,
    "ge": lambda p, x, y: x >= y,
    "eq": lambda p, x, y: x == y,
    "max": lambda p, x, y: np.maximum(x, y),
    "min": lambda p, x, y: np.minimum(x, y),
    "clamp": lambda p, low, x, high: np.clip(x, low, high),
    "select_n": lambda p, which, *xs: np.choose(which.astype(int), xs),
    "convert_element_type": lambda p, x: x,
    "reshape": lambda p, x: np.transpose(x, p["dimensions"]).reshape(p["new_sizes"]),
    "squeeze": lambda p, x: x.squeeze(p["dimensions"]),
    "concatenate": lambda p, *xs: np.concatenate(xs, p["dimension"]),
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
}
