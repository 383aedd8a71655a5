"""Scion, constrained and unconstrained: the algorithms that all others here vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from scion_jax._leaves import Norms
from scion_jax.norms import Auto
from scion_jax.transforms import average_gradients, chain, decay_weights, descend, scale_by_lmo


def scion(
    learning_rate: optax.ScalarOrSchedule,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    momentum: optax.ScalarOrSchedule = 0.1,
    momentum_dtype: DTypeLike | None = None,
    optimism: optax.ScalarOrSchedule = 0.0,
    shard_over: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scion: Frank–Wolfe over norm balls, which keeps every parameter inside its ball.

        d ← (1 − α) d + α g
        v = lmo(d)
        x ← (1 − γ) x − γ v

    A parameter that starts inside its ball (see `init_params`) stays there for γ ≤ 1, so the radius
    is its own regularization. A parameter whose norm says `constrained=False` moves by `−γ v` alone
    (gains and biases, if you like). Sign convention: `lmo` is the maximizer of `⟨d, ·⟩`, the
    negative of the paper's.

    Args:
        learning_rate: γ, in [0, 1]; a schedule receives the number of updates made.
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: A tree or prefix of labels, or a function from the parameters to one
            (`label_by_path`), as in `optax.multi_transform`; with a mapping only.
        momentum: α, in (0, 1]: one minus the usual momentum. May be a schedule.
        momentum_dtype: Dtype of the stored average; None means the parameters'.
        optimism: ᾱ, in [0, 1]: take the LMO of `(1 − ᾱ) d + ᾱ g` in place of `d`; ᾱ = α is
            Nesterov's momentum, as Muon has it. May be a schedule.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        A transformation. `update` needs `params`; the updates have the parameters' dtype.

    Raises:
        TypeError: If `norms` is none of these, a dtype is not floating, or a hyperparameter no
            number.
        ValueError: If norms and labels do not belong together, a hyperparameter is out of its
            range, a leaf does not fit its norm's layout (at `init`), or `params` is missing (at
            `update`).

    Example:
        >>> import jax, jax.numpy as jnp, optax, scion_jax
        >>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
        >>> optimizer = scion_jax.scion(0.1)
        >>> state = optimizer.init(params)
        >>> gradients = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> optax.apply_updates(params, updates)["bias"]
        Array([-0.1, -0.1, -0.1], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Alg. 2 (SCG) and 3; optimism: arXiv:2605.11172.
    """
    return chain(
        average_gradients(momentum, momentum_dtype, optimism),
        scale_by_lmo(norms, param_labels, shard_over),
        decay_weights(1.0, norms, param_labels),
        descend(learning_rate, constrained=True),
    )


def unconstrained_scion(
    learning_rate: optax.ScalarOrSchedule,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    momentum: optax.ScalarOrSchedule = 0.1,
    momentum_dtype: DTypeLike | None = None,
    optimism: optax.ScalarOrSchedule = 0.0,
    weight_decay: ArrayLike = 0.0,
    shard_over: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Unconstrained Scion: steps along the LMO, with optional weight decay.

        d ← (1 − α) d + α g
        v = lmo(d)
        x ← x − γ (μ x + v)

    Weight decay μ makes the ball of radius `radius/μ` the constraint set; μ = 1 is `scion`. It
    leaves out parameters whose norm says `constrained=False`. Sign
    convention: `lmo` is the maximizer of `⟨d, ·⟩`, the negative of the paper's.

    Args:
        learning_rate: γ; a schedule receives the number of updates made.
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: A tree or prefix of labels, or a function from the parameters to one
            (`label_by_path`), as in `optax.multi_transform`; with a mapping only.
        momentum: α, in (0, 1]: one minus the usual momentum. May be a schedule.
        momentum_dtype: Dtype of the stored average; None means the parameters'.
        optimism: ᾱ, in [0, 1]: take the LMO of `(1 − ᾱ) d + ᾱ g` in place of `d`; ᾱ = α is
            Nesterov's momentum, as Muon has it. May be a schedule.
        weight_decay: μ, at least 0.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        A transformation. `update` needs `params` unless `weight_decay` is a Python zero; the
        updates have the parameters' dtype.

    Raises:
        TypeError: If `norms` is none of these, a dtype is not floating, or a hyperparameter no
            number.
        ValueError: If norms and labels do not belong together, a hyperparameter is out of its
            range, a leaf does not fit its norm's layout (at `init`), or `params` is missing
            although weights decay (at `update`).

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> optimizer = scion_jax.unconstrained_scion(0.5, scion_jax.Euclidean(radius=2.0))
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, state = optimizer.update(params, optimizer.init(params))
        >>> updates
        Array([-0.6, -0.8], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Alg. 1 (uSCG) and 3; Sec. 3 for weight decay;
    optimism: arXiv:2605.11172.
    """
    return chain(
        average_gradients(momentum, momentum_dtype, optimism),
        scale_by_lmo(norms, param_labels, shard_over),
        decay_weights(weight_decay, norms, param_labels),
        descend(learning_rate),
    )
