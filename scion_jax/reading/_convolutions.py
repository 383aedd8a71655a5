"""Convolutions: products along windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scion_jax.reading._elementwise import unknown
from scion_jax.reading._meetings import product, settle
from scion_jax.reading._products import Side, of_data
from scion_jax.reading._uses import Operation, Uses
from scion_jax.reading._values import NONE, Constant, Data, Value, Weight
from scion_jax.reading._views import PLAIN, Factor, Move


def convolution(uses: Uses, operation: Operation, values: Sequence[Value]) -> Value:
    """Follows a convolution: `rhs_spec` tells what is what in the kernel."""
    params, shape = operation.params, operation.shape
    numbers, (image, kernel) = params["dimension_numbers"], values
    out, inside, *window = numbers.rhs_spec
    if isinstance(image, Weight) and isinstance(kernel, Constant):  # a filter that does not learn
        sizes = dict(enumerate(shape))
        return image._replace(views=tuple(v.spread(sizes, everywhere=True) for v in image.views))
    if isinstance(image, Weight):
        if image.data is None and image.dims() & {numbers.lhs_spec[0]}:
            uses.refuse(image.views, "it takes the place of the images in a convolution")
        image = settle(uses, image)  # a learned image
    if not isinstance(kernel, Weight):
        nowhere = Move([], [], [])
        images = Side([], [], range(len(shape)), nowhere)
        kernels = Side([inside, *window], [], [out], nowhere)
        both = [x._replace(traces=NONE) if isinstance(x, Data) else x for x in (image, kernel)]
        return of_data(uses, both, [images, kernels])
    if isinstance(image, Constant) or params["batch_group_count"] != 1:
        return unknown(uses, operation, [image, kernel])[0]
    letters = {inside: "i", **dict.fromkeys(window, "s")}
    pairs = [
        view.paired(letters) + _grouped(view.axes[out], params["feature_group_count"])
        for view in kernel.views
    ]
    places = [out if d == numbers.out_spec[1] else None for d in range(len(shape))]
    return product(uses, kernel, pairs, image, Move(places, operation.shapes[1], shape))


def _grouped(axis: Sequence[Factor], groups: int) -> list[tuple[Factor, str]]:
    """Gives the outermost `groups` of the output channels to groups, the rest to outputs."""
    pairs = []
    for factor in axis:
        shared = math.gcd(groups, factor.size)
        inner = factor._replace(size=factor.size // shared)
        if groups > 1:
            outer = Factor(factor.axis, factor.stride * inner.size, shared)
            pairs += [(outer, "g"), (inner, "o")] if inner.size > 1 else [(outer, "g")]
        else:
            pairs.append((inner, "o"))
        groups //= shared
    return [(factor, role) for factor, role in pairs if factor.axis != PLAIN]
