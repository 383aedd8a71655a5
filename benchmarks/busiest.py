"""What the busiest device executes, where each has its own matrices and passes over zeros."""

from collections import Counter
from dataclasses import replace
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case
from benchmarks.hlo import Choice, Cost
from scion_jax.distributed._places import places


def on_busiest(found: Cost, case: Case, devices: int) -> Cost:
    """Counts what the device with most to do executes, between any two collectives.

    Args:
        found: What a device executes that passes over nothing.
        case: The parameters.
        devices: How many devices there are.

    Returns:
        The same with fewer cycles and operations. Choices count whole if it is not known whose
        they are: other ones than ours, and of several stacks of one shape.
    """
    counts = Counter(matrix.shape for matrix in case.matrices)
    stacks = [jax.ShapeDtypeStruct((n, *shape), jnp.bfloat16) for shape, n in counts.items()]
    where = dict(zip(counts, places(stacks, devices), strict=True))
    shapes = Counter(map(_matrix, found.choices))
    known = [choice for choice in found.choices if shapes[_matrix(choice)] == 1]
    saved = np.zeros(3)
    for _, phase in groupby(known, key=lambda choice: choice.phase):
        work = np.zeros((devices, 3))
        total = np.zeros(3)
        for choice in phase:
            if of_matrix := where.get(_matrix(choice)):
                parts = np.array([choice.cycles, choice.cycles_in_products, choice.flops])
                work[list(of_matrix)] += parts
                total += parts
        saved += total - work[work[:, 0 if found.cycles else 2].argmax()]
    cycles, in_products, flops = map(int, saved)
    return replace(
        found,
        cycles=found.cycles - cycles,
        cycles_in_products=found.cycles_in_products - in_products,
        flops=found.flops - flops,
    )


def _matrix(choice: Choice) -> tuple[int, ...]:
    """Returns the shape of the matrix that a choice is about, `()` for another one."""
    if len(choice.shape) != 5 or choice.dtype != "bf16":
        return ()
    down, across, _, rows, columns = choice.shape
    return down * rows, across * columns
