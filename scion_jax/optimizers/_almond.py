"""ALMOND: the average of LMOs in place of the LMO of the average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax
from jax.typing import DTypeLike

from scion_jax._leaves import Norms
from scion_jax.norms import Auto
from scion_jax.transforms import average_gradients, chain, descend, scale_by_lmo


def almond(
    learning_rate: optax.ScalarOrSchedule,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    momentum: optax.ScalarOrSchedule = 0.1,
    momentum_dtype: DTypeLike | None = None,
    shard_over: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ALMOND: averages the LMOs of the gradients.

        d ← (1 − α) d + α lmo(g)
        x ← x − γ d

    A step is shorter than γ · radius where gradients disagree. Noise enters the LMO unaveraged, so
    it needs large batches to converge, where `unconstrained_scion` does not. Sign convention: `lmo`
    is the maximizer of `⟨g, ·⟩`, the negative of the paper's.

    Args:
        learning_rate: γ; a schedule receives the number of updates made.
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels of the parameters, as in `scion`; with a mapping only.
        momentum: α, in (0, 1]: one minus the usual momentum. May be a schedule.
        momentum_dtype: Dtype of the stored average; None means the parameters'.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        A transformation; `update` does not need `params`.

    Raises:
        TypeError: If `norms` is none of these, a dtype is not floating, or a hyperparameter no
            number.
        ValueError: If norms and labels do not belong together, a hyperparameter is out of its
            range, or a leaf does not fit its norm's layout.

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> optimizer = scion_jax.almond(1.0, scion_jax.Sign(normalized=False), momentum=0.5)
        >>> x = jnp.zeros((1, 2))
        >>> optimizer.update(jnp.array([[7.0, -0.1]]), optimizer.init(x), x)[0]
        Array([[-0.5,  0.5]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, Alg. 4.
    """
    return chain(
        scale_by_lmo(norms, param_labels, shard_over),
        average_gradients(momentum, momentum_dtype),
        descend(learning_rate),
    )
