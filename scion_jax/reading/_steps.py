"""Steps: which operations a gradient of the outputs reaches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Step:
    """An operation, each time that it is read.

    Attributes:
        before: The steps that a gradient goes to from here.
    """

    before: list[Step]

    def reached(self) -> set[Step]:
        """Finds all steps that a gradient goes to from here, this one as well."""
        found: set[Step] = {self}
        waiting: list[Step] = [self]
        while waiting:
            new = [step for step in waiting.pop().before if step not in found]
            found.update(new)
            waiting += new
        return found


def after(steps: Iterable[Step | None]) -> Step:
    """A step after others; None is what has no gradient."""
    return Step([step for step in steps if step is not None])


def differentiable(atom: Any) -> bool:
    """Whether a variable has a gradient at all."""
    return _is_inexact(getattr(atom.aval, "dtype", None))


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))
