"""Does it matter to the loss how exactly the polar factor is computed?

    python -m benchmarks.experiments.precision

Unconstrained Scion with different iterations for `U Vᵀ`, each tuned over the grid of learning
rates, with three seeds at the best one: our four steps in bfloat16 and in float32, the five quintic
steps of Muon and the published Scion runs, Polar Express, and an SVD.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from benchmarks.experiments import pictures
from benchmarks.experiments.optimizers import CONTESTANTS, LABELS, UNCONSTRAINED, Contestant
from benchmarks.experiments.records import Records, make_parser, tune
from benchmarks.experiments.training import Setting
from benchmarks.reporting import markdown
from scion_jax import ExactPolar, NewtonSchulz, Spectral, unconstrained_scion

ORTHOGONALIZERS = {
    "4 minimax, bfloat16": NewtonSchulz(compute_dtype=jnp.bfloat16),
    "4 minimax, float32": NewtonSchulz(compute_dtype=jnp.float32),
    "5 quintic, bfloat16": NewtonSchulz("quintic", compute_dtype=jnp.bfloat16),
    "5 Polar Express, bfloat16": NewtonSchulz("polar_express", compute_dtype=jnp.bfloat16),
    "SVD, float32": ExactPolar(),
}


def _with(orthogonalizer: NewtonSchulz | ExactPolar) -> Contestant:
    radius = UNCONSTRAINED["hidden"].radius
    norms = UNCONSTRAINED | {"hidden": Spectral(radius, orthogonalizer=orthogonalizer)}
    smallest = CONTESTANTS["unconstrained_scion"].smallest
    return Contestant(lambda rate, rho: unconstrained_scion(rate, norms, LABELS), smallest, norms)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "precision")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: 128)")
    parser.add_argument("--steps", type=int, default=200, help="of a run (default: 200)")
    options = parser.parse_args(arguments)
    contestants = {name: _with(by) for name, by in ORTHOGONALIZERS.items()}
    records = Records(options.out, contestants)
    base = Setting("", 0.0, width=options.width, steps=options.steps, evaluate_every=options.steps)
    tuned = {
        name: tune(records, dataclasses.replace(base, contestant=name), options.seeds)
        for name in contestants
    }
    figure, (axes,) = pictures.panels(1, "Validation loss, by iteration", width=7)
    colors = pictures.shades(len(tuned))
    for (name, found), color in zip(tuned.items(), colors, strict=True):
        pictures.draw_grid(axes, found.grid, found.losses, name, color)
    axes.set_ylabel("validation loss (nats per byte)")
    axes.legend()
    pictures.save(figure, options.out.with_suffix(".png"))
    rows = [[name, *found.summary()] for name, found in tuned.items()]
    print(markdown(["iteration", "best learning rate", "loss"], rows, texts=2))


if __name__ == "__main__":
    main()
