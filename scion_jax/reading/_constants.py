"""Constants: what is known of arrays that come of neither parameters nor inputs.

Two things matter: the value of an index, so that `kernel[2]` is a place and not somewhere; and
along which axis an array counts, so that data equal to it is one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.core
import numpy as np

from scion_jax.reading._uses import Operation
from scion_jax.reading._values import Constant

_LARGEST = 64

# What becomes of an index, such as -1, until it is used.
_FOLDED: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "lt": np.less,
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
    "convert_element_type": np.asarray,
}


def constant(array: Any) -> Constant:
    """Looks at an array: small ones of whole numbers may be indices."""
    if isinstance(array, float | jax.core.Tracer) or np.size(array) > _LARGEST:
        return Constant()
    kind = "i" if isinstance(array, int) else getattr(getattr(array, "dtype", None), "kind", "")
    return Constant(np.asarray(array)) if kind in ("i", "u") else Constant()


def fold(operation: Operation, values: Sequence[Constant]) -> Constant:
    """Follows an operation on constants."""
    name, params, _, shape, _ = operation
    known = [value.value for value in values]
    counting = [value.iota for value in values if value.iota]
    array, iota = None, ()
    if math.prod(shape) <= _LARGEST and all(value is not None for value in known):
        if name in _FOLDED:
            array = np.asarray(_FOLDED[name](*known))
        elif name == "broadcast_in_dim":
            new = tuple({*range(len(shape))} - {*params["broadcast_dimensions"]})
            array = np.broadcast_to(np.expand_dims(known[0], new), shape)
    if name == "iota":
        iota = (params["dimension"],)
    elif name == "broadcast_in_dim":
        iota = tuple(params["broadcast_dimensions"][axis] for axis in values[0].iota)
    elif name in ("convert_element_type", "add", "sub") and len(counting) == 1:
        (iota,) = counting
    elif name == "eq" and len(counting) == 2 and counting[0] != counting[1]:
        iota = counting[0] + counting[1]  # an identity matrix
    return Constant(array, iota)
