"""The optimizers that ``--optimizer`` chooses from, and the norm of every layer.

To add one, write a function from a `Recipe` to an Optax transformation and register it below.

To choose ρ for a clipped optimizer, one looks at the pairing ⟨d, w⟩ that its unclipped form shows.
Only the clipped forms keep it in their state; but with a ρ below every pairing they never clip, and
are the unclipped ones. So that is how Scion runs here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import muon

from gpt_mesh import spread_axes
from gpt_settings import Settings
from scion_jax import (
    ColNorm,
    Norm,
    Sign,
    Spectral,
    almond,
    clipped_scion,
    init_params,
    label_by_path,
    scion_light,
    unconstrained_clipped_scion,
    unconstrained_scion,
)

DECAYED_PART = 0.285  # of all steps, at the end, as in the published nanoGPT runs

NEVER_CLIPS = 1e-30  # a ρ below every pairing


@dataclass(frozen=True)
class Recipe:
    """What an optimizer is built from.

    Attributes:
        schedule: The learning rate by step.
        norms: The norm of each label (scion family).
        labels: The label of each parameter.
        settings: The momentum, ρ and the weight decay among others.
        shard_over: The mesh axes over which LMOs are shared out (scion family), or None.
    """

    schedule: optax.Schedule
    norms: Mapping[str, Norm]
    labels: Callable[[optax.Params], Any]
    settings: Settings
    shard_over: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Choice:
    """An entry of `OPTIMIZERS`.

    Attributes:
        build: Makes the transformation.
        starts_on_ball: Whether `init_params` gives the initial parameters, rather than Flax.
        defaults: Values of flags that suit the optimizer in the default run; ρ if it clips.
        accumulates: Whether it adds up the gradients of microbatches by itself.
    """

    build: Callable[[Recipe], optax.GradientTransformation]
    starts_on_ball: bool
    defaults: Mapping[str, float]
    accumulates: bool = False


def _of_family(
    optimizer: Callable[..., optax.GradientTransformation], recipe: Recipe, **options: Any
) -> optax.GradientTransformation:
    """Calls an optimizer of the Scion family with the arguments that all of them take."""
    return optimizer(
        recipe.schedule,
        recipe.norms,
        recipe.labels,
        momentum=recipe.settings.momentum,
        shard_over=recipe.shard_over,
        **options,
    )


def _scion(recipe: Recipe) -> optax.GradientTransformation:
    """The same as `scion`, and shows its pairing."""
    return _of_family(clipped_scion, recipe, rho=NEVER_CLIPS)


def _clipped_scion(recipe: Recipe) -> optax.GradientTransformation:
    return _of_family(clipped_scion, recipe, rho=recipe.settings.rho)


def _unconstrained_scion(recipe: Recipe) -> optax.GradientTransformation:
    """The same as `unconstrained_scion`, and shows its pairing.

    With weight decay it has no clipped form: no ρ to choose, so no pairing to look at.
    """
    if recipe.settings.weight_decay:
        return _of_family(unconstrained_scion, recipe, weight_decay=recipe.settings.weight_decay)
    return _of_family(unconstrained_clipped_scion, recipe, rho=NEVER_CLIPS)


def _unconstrained_clipped_scion(recipe: Recipe) -> optax.GradientTransformation:
    return _of_family(unconstrained_clipped_scion, recipe, rho=recipe.settings.rho)


def _scion_light(recipe: Recipe) -> optax.GradientTransformation:
    """Makes the steps of `scion`; its one buffer is also the accumulator."""
    return _of_family(scion_light, recipe, every_k=recipe.settings.accumulate)


def _almond(recipe: Recipe) -> optax.GradientTransformation:
    return _of_family(almond, recipe)


def _adamw(recipe: Recipe) -> optax.GradientTransformation:
    return optax.adamw(recipe.schedule, b2=0.95, weight_decay=recipe.settings.weight_decay)


def _muon(recipe: Recipe) -> optax.GradientTransformation:
    """Muon on the hidden matrices, Adam with a smaller step on embedding and head."""
    adam = optax.adam(lambda step: 0.15 * recipe.schedule(step), nesterov=True)
    hidden = muon(recipe.schedule, weight_decay=recipe.settings.weight_decay)
    parts = {label: hidden if label == "hidden" else adam for label in recipe.norms}
    return optax.multi_transform(parts, recipe.labels)


# In the scion family, the learning rate times the radius is the step; a constrained optimizer needs
# a radius that leaves the weights room to grow, hence a smaller learning rate. ρ is about the
# median of the pairings in a default run.
CONSTRAINED = {"learning_rate": 2**-8, "hidden_radius": 4.0, "head_radius": 64.0}
UNCONSTRAINED = {"learning_rate": 2**-5, "hidden_radius": 0.5, "head_radius": 8.0}
OPTIMIZERS: dict[str, Choice] = {
    "scion": Choice(_scion, True, CONSTRAINED),
    "clipped_scion": Choice(_clipped_scion, True, CONSTRAINED | {"rho": 16.0}),
    "unconstrained_scion": Choice(_unconstrained_scion, True, UNCONSTRAINED),
    "unconstrained_clipped_scion": Choice(
        _unconstrained_clipped_scion, True, UNCONSTRAINED | {"rho": 1.5}
    ),
    "scion_light": Choice(_scion_light, True, CONSTRAINED, accumulates=True),
    "almond": Choice(_almond, True, UNCONSTRAINED),
    "adamw": Choice(_adamw, False, {"learning_rate": 0.004}),
    "muon": Choice(_muon, False, {"learning_rate": 0.02}),
}


def layer_labels(settings: Settings) -> Callable[[optax.Params], Any]:
    """Returns the role of each matrix by its path; the first pattern that matches decides."""
    head = [] if settings.tied else [("^head", "head")]
    return label_by_path([("^embedding", "embedding"), *head, ("", "hidden")])


def layer_norms(settings: Settings) -> dict[str, Norm]:
    """Returns the published norm of each label, for tied or untied embeddings.

    A token is a one-hot input, so an untied embedding has the column norm. A tied one is a head
    first of all and has the head's norm; as its table lists the vocabulary first, its layout is
    that of a matrix from width (``i``) to vocabulary (``o``). A head of its own starts at zero, so
    that the first predictions are uniform.
    """
    hidden = Spectral(settings.hidden_radius)
    if settings.tied:
        return {"embedding": Sign(settings.head_radius, layout="oi"), "hidden": hidden}
    return {
        "embedding": ColNorm(settings.embedding_radius),
        "hidden": hidden,
        "head": Sign(settings.head_radius, zero_init=True),
    }


def learning_rate_schedule(settings: Settings) -> optax.Schedule:
    """Returns a constant learning rate with a linear decay to zero at the end, no warm-up."""
    decayed = max(1, round(DECAYED_PART * settings.steps))
    return optax.join_schedules(
        [
            optax.constant_schedule(settings.learning_rate),
            optax.linear_schedule(settings.learning_rate, 0.0, decayed),
        ],
        boundaries=[settings.steps - decayed],
    )


def prepare(
    settings: Settings, params: optax.Params
) -> tuple[optax.GradientTransformation, optax.Params]:
    """Makes the optimizer and the parameters it starts from.

    Args:
        settings: The run's settings.
        params: The parameters as Flax initialized them.

    Returns:
        The optimizer and the initial parameters.
    """
    choice = OPTIMIZERS[settings.optimizer]
    norms, labels = layer_norms(settings), layer_labels(settings)
    schedule, axes = learning_rate_schedule(settings), spread_axes(settings.mesh)
    recipe = Recipe(schedule, norms, labels, settings, axes)
    optimizer = choice.build(recipe)
    if settings.accumulate > 1 and not choice.accumulates:
        optimizer = optax.MultiSteps(optimizer, settings.accumulate).gradient_transformation()
    if choice.starts_on_ball:
        params = init_params(jax.random.key(settings.seed), params, norms, labels)
    return optimizer, params
