"""Convolutions, and products that are written out as a multiplication and a sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scion_jax.reading._elementwise import unknown
from scion_jax.reading._products import Side, of_data, paired, product
from scion_jax.reading._uses import Uses
from scion_jax.reading._values import Constant, Data, Value, Weight
from scion_jax.reading._views import PLAIN, Factor, Part


def convolution(uses: Uses, equation: Any, values: Sequence[Value]) -> Value:
    """Follows a convolution: `rhs_spec` tells what is what in the kernel."""
    params, shape = equation.params, equation.outvars[0].aval.shape
    numbers, (image, kernel) = params["dimension_numbers"], values
    out, inside, *window = numbers.rhs_spec
    if isinstance(image, Weight) and isinstance(kernel, Constant):  # a filter that does not learn
        return image._replace(views=tuple(view.scattered(shape) for view in image.views))
    if isinstance(image, Weight) and image.data:
        image = uses.settle(image)
    if isinstance(image, Weight):  # a learned image
        if any(view.dims() & {numbers.lhs_spec[0]} for view in image.views):
            uses.refuse(image, "it takes the place of the images in a convolution")
        image = uses.entrywise(image)
    if not isinstance(kernel, Weight):
        everything = Side([], [], range(len(shape)), [])
        return of_data(uses, [image, kernel], [everything, Side([inside, *window], [], [out], [])])
    if isinstance(image, Constant) or params["batch_group_count"] != 1:
        return unknown(uses, equation, [image, kernel])[0]
    letters = {inside: "i", **dict.fromkeys(window, "s")}
    pairs = [
        paired(view, letters) + _grouped(view.axes[out], params["feature_group_count"])
        for view in kernel.views
    ]
    places = [out if d == numbers.out_spec[1] else None for d in range(len(shape))]
    return product(uses, kernel, pairs, image, places, shape)


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


def summed(uses: Uses, weight: Weight, axes: Sequence[int], shape: Sequence[int]) -> Data | None:
    """A sum of a weight that data scaled is a product written out; None if it is none."""
    data = weight.data
    if data is None or weight.picked or any(view.part != Part.WHOLE for view in weight.views):
        return None
    pairs = []
    for view in weight.views:
        letters = {d: "i" if d in axes else "b" for d in view.dims() - data.flat}
        letters |= {d: "-" if d in axes else "o" for d in view.dims() & data.flat}
        if not {"i", "o"} <= set(letters.values()):
            return None
        pairs.append(paired(view, letters))
    kept = [d for d in range(len(weight.views[0].axes)) if d not in axes]
    return product(uses, weight._replace(data=None), pairs, data, kept, shape)
