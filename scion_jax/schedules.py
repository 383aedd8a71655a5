"""Schedules that the theory asks for and Optax does not have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def vanishing_momentum() -> optax.Schedule:
    """Makes the momentum that removes the noise of stochastic gradients in the limit.

        α_k = 1 / √k,    k = 1, 2, …

    With a learning rate that vanishes as `k^(−3/4)`, Scion then converges at the optimal rate
    `k^(−1/4)` whatever the batch size. An Optax schedule receives the number of updates made, so
    this is `1 / √(count + 1)`.

    Returns:
        A schedule for `momentum`, float32.

    Example:
        >>> import scion_jax
        >>> optimizer = scion_jax.scion(0.01, momentum=scion_jax.vanishing_momentum())
        >>> alpha = scion_jax.vanishing_momentum()
        >>> float(alpha(0)), float(alpha(3))
        (1.0, 0.5)

    Source: [S] Pethick et al., arXiv:2502.07529, Theorems 5.5 and 5.7.
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return jax.lax.rsqrt(jnp.asarray(count, jnp.float32) + 1)

    return schedule
