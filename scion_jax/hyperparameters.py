"""Checks of hyperparameters, when an optimizer or a norm is built.

Only what is there to be seen is looked at: plain numbers and concrete arrays. Traced values pass
(`optax.inject_hyperparams`, `jax.vmap` over radii). A schedule is asked for its shape, and for its
value at the first update, since the mistakes that happen (None, a vector, 0.95 for 0.05) show
there; of what it returns later only the type is looked at.
"""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from scion_jax.numerics import SUPPORTED, is_number


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Checks that an argument is one number in a range.

    Args:
        name: What the argument is called.
        value: What was given.
        above: What it must be above.
        at_least: What it must not be below.
        below: What it must be below.
        at_most: What it must not be above.

    Raises:
        TypeError: If it is neither a number nor an array of numbers.
        ValueError: If it has a shape, is NaN, or lies outside of the range.
    """
    _check_type(name, value)
    if isinstance(value, jax.core.Tracer):
        return
    number = float(value)  # pyright: ignore[reportArgumentType]
    limits = (
        (above, "above", operator.gt),
        (at_least, "at least", operator.ge),
        (below, "below", operator.lt),
        (at_most, "at most", operator.le),
    )
    stated = [(limit, word, holds) for limit, word, holds in limits if limit is not None]
    if not all(holds(number, limit) for limit, _, holds in stated):
        wanted = [f"{w} {x:g}" if math.isfinite(x) else "finite" for x, w, _ in stated]
        raise ValueError(f"{name} must be {' and '.join(wanted)}; got {value}")


def _check_type(name: str, value: object) -> None:
    """Checks all but the range."""
    if is_number(value):
        return
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} must be a number; got an array of dtype {value.dtype}")
    if value.shape:
        raise ValueError(f"{name} must be one number; got an array of shape {value.shape}")


def check_schedule(name: str, value: object, **limits: float) -> None:
    """Checks that an argument is a number in a range, or a schedule of such numbers.

    Args:
        name: What the argument is called.
        value: A number, or a function of the number of updates made.
        **limits: As in `check_number`.

    Raises:
        TypeError: If it is neither, or if the function does not take a count or return a number.
        ValueError: If the number, or the function's at the first update, has a shape or lies
            outside of the range.
    """
    if not callable(value):
        check_number(name, value, **limits)
        return
    with jax.ensure_compile_time_eval():
        first = value_at(name, value, jnp.zeros([], jnp.int32))
    check_number(f"{name}, a schedule, at the first update", first, **limits)


def check_learning_rate(learning_rate: object, constrained: bool) -> None:
    """Checks γ.

    Args:
        learning_rate: A number or a schedule.
        constrained: Whether steps go at most all the way to the extreme point, γ = 1.

    Raises:
        TypeError: If it is neither a number nor a schedule of numbers.
        ValueError: If it is negative, too large or not finite.
    """
    limits = {"at_most": 1.0} if constrained else {"below": math.inf}
    check_schedule("learning_rate", learning_rate, at_least=0, **limits)


def check_momentum(momentum: object, dtype: DTypeLike | None) -> None:
    """Checks α and the dtype of its buffer.

    Args:
        momentum: A number or a schedule.
        dtype: Dtype of the buffer, or None.

    Raises:
        TypeError: If `momentum` is neither, or `dtype` is not floating.
        ValueError: If `momentum` is not in (0, 1].
    """
    check_schedule("momentum (1 minus the usual momentum)", momentum, above=0, at_most=1)
    check_dtype("momentum_dtype", dtype)
    if is_number(momentum) and 0.8 <= momentum < 1:
        warnings.warn(
            f"momentum is 1 minus the usual momentum, and {momentum} forgets almost everything at "
            f"every step; write {1 - momentum:.3g} for what others call {momentum}",
            stacklevel=level_of_the_caller(),
        )


def level_of_the_caller() -> int:
    """Counts the frames from a `warnings.warn` to the first that is not of this package."""
    package = __name__.partition(".")[0]
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals["__name__"].partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level  # the frame that warns is level 1, and this one lies beneath it


def check_whole(name: str, value: object) -> None:
    """Checks that an argument is a whole number of at least 1, or None.

    Args:
        name: What the argument is called.
        value: What was given.

    Raises:
        TypeError: If it is neither None nor an integer.
        ValueError: If it is less than 1.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number or None; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def check_dtype(name: str, dtype: DTypeLike | None) -> None:
    """Checks that a dtype is floating and wide enough to compute with, or None.

    Args:
        name: What the argument is called.
        dtype: What was given.

    Raises:
        TypeError: If it is neither.
    """
    if dtype is None:
        return
    try:
        known = jnp.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is a dtype such as jnp.bfloat16; got {dtype!r}") from error
    if str(known) not in SUPPORTED:
        raise TypeError(
            f"{name} must be a floating dtype, one of {', '.join(SUPPORTED)}; got {known}"
        )


def check_shape(shape: object) -> None:
    """Raises `TypeError` unless it is a sequence of sizes."""
    if isinstance(shape, Sequence) and all(
        isinstance(size, int | np.integer) and not isinstance(size, bool) and size >= 0
        for size in shape
    ):
        return
    raise TypeError(f"shape is a tuple of sizes, such as (64, 128); got {shape!r}")


def check_flag(name: str, value: object) -> None:
    """Raises `TypeError` unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is True or False; got {value!r}")


def check_transformation(name: str, value: object) -> None:
    """Raises `TypeError` unless it is a gradient transformation (a norm has an `init`, too)."""
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} is a gradient transformation, such as scale_by_lmo(Spectral()); got {value!r}"
        )


def check_key(key: object) -> None:
    """Raises `TypeError` unless it is one PRNG key, typed or of the old kind."""
    if isinstance(key, jax.Array | np.ndarray):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == 0 if typed else (key.ndim == 1 and key.dtype == jnp.uint32):
            return
    raise TypeError(f"key is one PRNG key, such as jax.random.key(0); got {key!r}")


def value_at(name: str, value: Any, count: ArrayLike) -> ArrayLike:
    """Evaluates a number or a schedule.

    Args:
        name: What the argument is called.
        value: A number, or a function of the number of updates made.
        count: The number of updates made.

    Returns:
        The number, which may be traced.

    Raises:
        TypeError: If the function does not take a count, or does not return a number.
        ValueError: If what it returns has a shape.
    """
    if not callable(value):
        return value
    try:
        number: Any = value(count)
    except TypeError as error:
        raise TypeError(
            f"{name} is a number or a schedule, a function of the number of updates made; calling "
            f"{_name_of(value)} with a count failed ({error})"
        ) from error
    except Exception as error:
        error.add_note(f"This is of {name}: the schedule {_name_of(value)} was given a count.")
        raise
    _check_type(f"{name}, a schedule,", number)
    return number


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
