"""Do weights stay in their balls, and how far do they go without?

    python -m benchmarks.experiments.boundedness   # [S] Fig. 8 and 9

Scion and unconstrained Scion train for many steps at a constant learning rate. Drawn is the largest
norm among the matrices of each kind, as a multiple of the radius of one step.
"""

from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.experiments import pictures
from benchmarks.experiments.optimizers import CONSTRAINED, CONTESTANTS, LABELS, UNCONSTRAINED
from benchmarks.experiments.records import make_parser, write_json
from benchmarks.experiments.text import TEXT
from benchmarks.experiments.training import Setting, compiled
from benchmarks.reporting import markdown
from scion_jax import gauge_bounds

RATES = {"scion": 2**-8, "unconstrained_scion": 2**-5}
BALLS = {"scion": CONSTRAINED, "unconstrained_scion": UNCONSTRAINED}
KINDS = ("embedding", "hidden", "head")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "boundedness")
    parser.add_argument("--steps", type=int, default=3000, help="of a run (default: 3000)")
    parser.add_argument("--width", type=int, default=64, help="of the model (default: 64)")
    options = parser.parse_args(arguments)
    every = max(1, options.steps // 60)
    figure, axes = pictures.panels(2, "Largest gauge, by kind of matrix", width=5, sharey=False)
    rows, results = [], {}
    for (name, rate), panel in zip(RATES.items(), axes, strict=True):
        setting = Setting(
            name, rate, width=options.width, steps=options.steps, decayed=0.0, batch=16
        )
        largest = follow(setting, every)
        results[name] = {kind: numbers.round(4).tolist() for kind, numbers in largest.items()}
        steps = np.arange(len(largest["hidden"])) * every
        for kind, numbers in largest.items():
            panel.plot(steps, numbers, label=kind)
            shown = (numbers[0], numbers[len(numbers) // 2], numbers[-1], numbers.max())
            rows.append([name, kind, *(f"{number:.3f}" for number in shown)])
        panel.set_title(name)
        panel.set_xlabel("steps")
        panel.legend()
    axes[0].axhline(1.0, color="black", linestyle=":")
    axes[0].set_ylabel("gauge: norm / radius")
    pictures.save(figure, options.out.with_suffix(".png"))
    write_json(options.out, {"steps": options.steps, "every": every, "gauges": results})
    titles = ["optimizer", "matrices", "start", "middle", "end", "largest"]
    print(markdown(titles, rows, texts=2))


def follow(setting: Setting, every: int) -> dict[str, np.ndarray]:
    """Trains, and looks at the norms now and then.

    Args:
        setting: The run.
        every: Steps between two looks.

    Returns:
        The largest gauge of each kind of matrix, before the first step and after each look.
    """
    start, steps, _ = compiled(setting, CONTESTANTS[setting.contestant], TEXT)
    bounds = jax.jit(lambda params: gauge_bounds(params, BALLS[setting.contestant], LABELS))
    state = start(jax.random.key(setting.seed))
    kinds = jax.tree.leaves(LABELS(state[0]))
    seen = []
    for first in range(0, setting.steps + 1, every):
        by_path = bounds(state[0])
        pairs = list(zip(kinds, by_path.values(), strict=True))
        seen.append({k: max(float(bound) for kind, bound in pairs if kind == k) for k in KINDS})
        if first + every <= setting.steps:
            windows = TEXT.draw(setting, first, every)
            state, _ = steps(state, windows, setting.learning_rate, setting.rho)
    return {kind: np.array([look[kind] for look in seen]) for kind in KINDS}


if __name__ == "__main__":
    main()
