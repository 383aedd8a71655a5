"""What the default device is good at."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_CPU_DESCRIPTION = Path("/proc/cpuinfo")


def multiplies_bfloat16() -> bool:
    """Tells whether products of bfloat16 matrices are faster than those of float32 ones.

    They are on accelerators, and on x86 processors with instructions for them (about twice as
    fast; on others they are slower). JAX does not say which instructions a CPU has; Linux does, and
    on other systems the answer for a CPU is no.

    Returns:
        Whether the default backend does.
    """
    return jax.default_backend() != "cpu" or "avx512_bf16" in _cpu_flags(_CPU_DESCRIPTION)


def is_bfloat16_on_cpu(dtype: DTypeLike) -> bool:
    """Tells whether a dtype is bfloat16 and the default backend a CPU's, which needs care."""
    return jax.default_backend() == "cpu" and jnp.dtype(dtype) == jnp.bfloat16


@functools.cache
def _cpu_flags(description: Path) -> frozenset[str]:
    try:
        lines = description.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(flags, "").split())
