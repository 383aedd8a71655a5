"""ScionLight: Scion that keeps the gradients' sum in place of their average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from scion_jax._checks import (
    check_alike,
    check_momentum,
    check_number,
    check_schedule,
    value_at,
)
from scion_jax._leaves import Norms
from scion_jax._numerics import is_number, widest
from scion_jax._sharding import zeros_like
from scion_jax.norms import Auto
from scion_jax.transforms import (
    blend,
    buffer_dtypes,
    chain,
    decay_weights,
    descend,
    remember,
    scale_by_lmo,
    store,
)


class ScionLightState(NamedTuple):
    """State of `scion_light`.

    Attributes:
        count: Number of steps made, int32.
        gathered: Gradients added since the last step, int32; always 0 if `every_k` is 1.
        gradient_sum: The buffer `G`, like the parameters.
        inner_state: State of the stages that turn `G` into a step.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    gathered: jax.Array
    gradient_sum: Any
    inner_state: Any


def scion_light(
    learning_rate: optax.ScalarOrSchedule,
    norms: Norms = Auto(),
    param_labels: Any = None,
    *,
    momentum: optax.ScalarOrSchedule = 0.1,
    momentum_dtype: DTypeLike | None = None,
    optimism: optax.ScalarOrSchedule = 0.0,
    unconstrained: bool = False,
    every_k: ArrayLike = 1,
    shard_over: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """ScionLight: one buffer, which is also the gradient accumulator.

        G ← G + g                              every call
        v = lmo(G)                             every k-th call
        x ← (1 − γ) x − γ v    or    x ← x − γ v    (`unconstrained`)
        G ← (1 − α) G

    `G` is the average of `scion` divided by α, and the LMO does not see the difference: with a
    constant α the steps are those of `scion` under `optax.MultiSteps(every_k)`, up to rounding,
    without the accumulator's buffer. With a scheduled α they are not: the formulas then weigh past
    gradients differently. At α = 1 the buffer is forgotten after each step (the PyTorch reference
    keeps it undecayed there, which sums all gradients ever seen). The k−1 calls in between return
    zero updates and run no LMO.

    With `optimism` the LMO sees `(1 − ᾱ) αG + ᾱ g`, which is `d̄` of `scion`, for `αG` is its `d`.
    With `every_k` it sees `(1 − ᾱ) αG + ᾱ k g`: one buffer cannot tell the gradients of this step
    from earlier ones, so the last of them stands for all k. That is right in the mean, but noisier
    than `scion` under `optax.MultiSteps`, which looks ahead along their mean.

    What it saves in JAX: with accumulation, one buffer of the parameters' size; in PyTorch the
    buffer is also the gradient, but JAX hands the gradient in as an array of its own, so without
    accumulation nothing is saved. `G` is up to `every_k/α` times as large as a gradient; for
    float16 parameters give it a `momentum_dtype` of wider range. Sign convention: `lmo` is the
    maximizer of `⟨G, ·⟩`, the negative of the paper's.

    Args:
        learning_rate: γ, in [0, 1] unless `unconstrained`; a schedule receives the number of steps
            made.
        norms: One norm, a mapping from labels to norms, or an `Assignment`.
        param_labels: Labels of the parameters, as in `scion`; with a mapping only.
        momentum: α, in (0, 1]: one minus the usual momentum. May be a schedule of the steps made.
        momentum_dtype: Dtype of the buffer `G`; None means the parameters'.
        optimism: ᾱ, in [0, 1]: look ahead along the newest gradient; ᾱ = α is Nesterov's momentum,
            as Muon has it. May be a schedule, of the steps made.
        unconstrained: Leave out the pull towards zero.
        every_k: Number of calls per step, at least 1.
        shard_over: Over which devices matrices are spread; see `scion_jax.distributed`.

    Returns:
        A transformation. `update` needs `params` unless `unconstrained`; the updates have the
        parameters' dtype.

    Raises:
        TypeError: If `norms` is none of these, a dtype is not floating, or a hyperparameter no
            number.
        ValueError: If norms and labels do not belong together, a hyperparameter is out of its
            range, a leaf does not fit its norm's layout, or `params` is missing (at `update`).

    Example:
        >>> import jax.numpy as jnp, scion_jax
        >>> optimizer = scion_jax.scion_light(0.1, scion_jax.Sign(normalized=False), every_k=2)
        >>> x = jnp.ones((1, 2))
        >>> state = optimizer.init(x)
        >>> updates, state = optimizer.update(jnp.array([[1.0, -3.0]]), state, x)
        >>> updates, state = optimizer.update(jnp.array([[1.0, 2.0]]), state, x)
        >>> updates
        Array([[-0.2,  0. ]], dtype=float32)

    Source: [S] Pethick et al., arXiv:2502.07529, App. E.2; optimism: arXiv:2605.11172.
    """
    check_momentum(momentum, momentum_dtype)
    check_schedule("optimism", optimism, "optimism")
    check_number("count", every_k, "every_k")
    take_step = optax.with_extra_args_support(
        optax.chain(
            scale_by_lmo(norms, param_labels, shard_over),
            decay_weights(0.0 if unconstrained else 1.0, norms, param_labels),
            descend(learning_rate, constrained=not unconstrained),
        )
    )

    def init(params: Any) -> ScionLightState:
        inner = take_step.init(params)  # which refuses what is no parameter
        # An array for each field: donation takes none twice.
        count, gathered = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        gradient_sum = jax.tree.map(lambda p: zeros_like(p, momentum_dtype), params)
        return ScionLightState(count, gathered, gradient_sum, inner)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        check_alike(updates, state.gradient_sum, "the gradients", "the sum in the state")
        dtypes = buffer_dtypes(state.gradient_sum, momentum_dtype, params)
        gradient_sum = jax.tree.map(_add, updates, state.gradient_sum)

        def step(gradient_sum: Any, state: Any, like: Any) -> tuple[Any, ScionLightState]:
            alpha = value_at("momentum", momentum, state.count, "momentum")
            ahead = value_at("optimism", optimism, state.count, "optimism")
            seen = _look_ahead(gradient_sum, updates, alpha, ahead, state.gathered + 1)
            steps, inner = take_step.update(seen, state.inner_state, params, **extra_args)
            steps = jax.tree.map(lambda u, x: u.astype(x.dtype), steps, like)
            decayed = jax.tree.map(lambda g: remember(g, alpha), gradient_sum)
            count = jnp.asarray(optax.safe_increment(state.count))
            gathered = jnp.zeros_like(state.gathered)
            stored = _stored(decayed, dtypes, state)
            return steps, ScionLightState(count, gathered, stored, inner)

        def wait(gradient_sum: Any, state: Any, like: Any) -> tuple[Any, ScionLightState]:
            nothing = jax.tree.map(jnp.zeros_like, like)
            stored = _stored(gradient_sum, dtypes, state)
            return nothing, state._replace(gathered=state.gathered + 1, gradient_sum=stored)

        like = updates if params is None else params
        if is_number(every_k) and every_k == 1:  # no conditional to compile
            return step(gradient_sum, state, like)
        due = state.gathered + 1 >= jnp.asarray(every_k, jnp.int32)
        return jax.lax.cond(due, step, wait, gradient_sum, state, like)

    return chain(optax.GradientTransformationExtraArgs(init, update))


def _look_ahead(
    gradient_sum: Any, gradients: Any, alpha: ArrayLike, optimism: ArrayLike, gathered: jax.Array
) -> Any:
    """Computes `(1 − ᾱ) αG + ᾱ k g` of k gathered gradients, up to scale."""
    if is_number(optimism) and optimism == 0:  # spares a pass over memory
        return gradient_sum
    # A schedule may end at α = 0; without optimism the direction is that of G, whatever α.
    own = jnp.where(jnp.equal(optimism, 0), 1, alpha)

    def look(total: jax.Array, g: jax.Array) -> jax.Array:
        dtype = total.dtype
        return blend(own.astype(dtype) * total, gathered.astype(dtype) * g.astype(dtype), optimism)

    return jax.tree.map(look, gradient_sum, gradients)


def _add(g: jax.Array, total: jax.Array) -> jax.Array:
    wide = widest(g.dtype, total.dtype, jnp.float32)
    return total.astype(wide) + g.astype(wide)


def _stored(gradient_sum: Any, dtypes: Any, state: ScionLightState) -> Any:
    call = state.count + (state.gathered << 16)  # differs from the last call's, for any `every_k`
    return jax.tree.map(lambda g, dtype: store(g, dtype, call), gradient_sum, dtypes)
