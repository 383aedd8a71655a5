"""The primitives that a parameter may pass through, and who follows each.

The list is closed: a parameter that meets any other primitive is refused, since nobody knows what
it is then. To add one: a function of the uses, the operation and its values that returns the value
of the result (a list, if there are several), and a line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scion_jax.reading import _lookups as lookups
from scion_jax.reading import _moves as moves
from scion_jax.reading import _products as products
from scion_jax.reading._control_flow import Rule
from scion_jax.reading._convolutions import convolution
from scion_jax.reading._elementwise import LINEAR, SEVERAL, UNARY, elementwise, stopped
from scion_jax.reading._uses import Operation, Uses
from scion_jax.reading._values import Data, Value, Weight


def _each(uses: Uses, operation: Operation, values: Sequence[Value]) -> list[Value]:
    """Several operands, each for itself."""
    return list(values)


def _stop(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    (value,) = values
    if isinstance(value, Data):
        return value._replace(pending=frozenset())
    return stopped(value) if isinstance(value, Weight) else value


_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin"
_ALONG_AXES = "rev cumsum cumprod cummax cummin cumlogsumexp fft tile"

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(LINEAR | UNARY | SEVERAL, elementwise),
    **dict.fromkeys("optimization_barrier psum psum2 psum_invariant pmax pmin".split(), _each),
    **dict.fromkeys(_REDUCTIONS.split(), moves.reduce),
    **dict.fromkeys(_ALONG_AXES.split(), moves.along_axes),
    **dict.fromkeys("scatter scatter-add dynamic_update_slice".split(), lookups.update),
    "stop_gradient": _stop,
    "dot_general": products.dot_general,
    "ragged_dot_general": products.ragged_dot,
    "conv_general_dilated": convolution,
    "broadcast_in_dim": moves.broadcast_in_dim,
    "transpose": moves.transpose,
    "squeeze": moves.squeeze,
    "reshape": moves.reshape,
    "slice": moves.slice_,
    "split": moves.split,
    "stack": moves.stack,
    "unstack": moves.unstack,
    "concatenate": moves.concatenate,
    "pad": moves.pad,
    "gather": lookups.gather,
    "dynamic_slice": lookups.dynamic_slice,
}
