"""The primitives that a parameter may pass through, and who follows each.

The list is closed: a parameter that meets any other primitive is refused, since nobody knows what
it is then. To add one: a function of the uses, the equation and its values that returns the value
of the result (a list, if there are several), and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scion_jax.reading import _lookups as lookups
from scion_jax.reading import _products as products
from scion_jax.reading import _structure as structure
from scion_jax.reading._control_flow import Rule
from scion_jax.reading._elementwise import LINEAR, SEVERAL, UNARY, elementwise, stopped
from scion_jax.reading._uses import Uses
from scion_jax.reading._views import Data, Value, Weight


def _each(uses: Uses, equation: Any, values: Sequence[Value]) -> list[Value]:
    """Several operands, each for itself."""
    return list(values)


def _stop(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    (value,) = values
    if isinstance(value, Data):
        return value._replace(pending=frozenset())
    return stopped(value) if isinstance(value, Weight) else value


_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin"
_ALONG_AXES = "rev cumsum cumprod cummax cummin cumlogsumexp fft tile"

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(LINEAR | UNARY | SEVERAL, elementwise),
    **dict.fromkeys("optimization_barrier psum psum2 psum_invariant pmax pmin".split(), _each),
    **dict.fromkeys(_REDUCTIONS.split(), structure.reduce),
    **dict.fromkeys(_ALONG_AXES.split(), structure.along_axes),
    **dict.fromkeys("scatter scatter-add dynamic_update_slice".split(), lookups.update),
    "stop_gradient": _stop,
    "dot_general": products.dot_general,
    "ragged_dot_general": products.ragged_dot,
    "conv_general_dilated": products.convolution,
    "reshape": structure.reshape,
    "broadcast_in_dim": structure.broadcast_in_dim,
    "transpose": structure.transpose,
    "squeeze": structure.squeeze,
    "slice": structure.slice_,
    "split": structure.split,
    "stack": structure.stack,
    "unstack": structure.unstack,
    "concatenate": structure.concatenate,
    "pad": structure.pad,
    "gather": lookups.gather,
    "dynamic_slice": lookups.dynamic_slice,
}
