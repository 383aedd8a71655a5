"""Do activations keep their size when the model gets wider?

    python -m benchmarks.experiments.coordinate_check   # [S] Fig. 4

A GPT is trained for ten steps at each width, with the spectral norm's factor `√(d_out/d_in)` and
with `max(1, √(d_out/d_in))`. Drawn are the root mean squares of what each block returns
and of the logits: at the start, and of their change in ten steps. Flat lines are
what lets a learning rate carry over.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.experiments import pictures
from benchmarks.experiments.optimizers import CONTESTANTS, LABELS, UNCONSTRAINED, Contestant
from benchmarks.experiments.records import make_parser, write_json
from benchmarks.experiments.text import TEXT
from benchmarks.experiments.training import Setting, compiled, structure_of
from benchmarks.reporting import markdown
from examples.nanogpt import rms_norm
from scion_jax import Spectral, unconstrained_scion

STEPS = 10
WIDTHS = (64, 128, 256, 512)


def _with(largest: bool) -> Contestant:
    """Unconstrained Scion, the spectral norm with `max=True` or without."""
    norms = UNCONSTRAINED | {"hidden": Spectral(UNCONSTRAINED["hidden"].radius, max=largest)}
    smallest = CONTESTANTS["unconstrained_scion"].smallest
    return Contestant(lambda rate, rho: unconstrained_scion(rate, norms, LABELS), smallest, norms)


FACTORS = {"√(d_out/d_in)": _with(largest=False), "max(1, √(d_out/d_in))": _with(largest=True)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the experiment, prints its table and draws its picture.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = make_parser(__doc__, "coordinate_check")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--learning-rate", type=float, default=2**-6, help="default: 2^-6")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    rows = []
    figure, axes = pictures.panels(4, "Root mean square of activations", width=3.6, sharey=False)
    for index, (factor, contestant) in enumerate(FACTORS.items()):
        by_width = {}
        for width in options.widths:
            setting = Setting(
                "", options.learning_rate, width=width, steps=STEPS, evaluate_every=STEPS
            )
            seeds = [
                sizes(dataclasses.replace(setting, seed=seed), contestant)
                for seed in range(options.seeds)
            ]
            by_width[width] = {key: float(np.mean([run[key] for run in seeds])) for key in seeds[0]}
        results[factor] = by_width
        rows += [
            [factor, str(width), *(f"{number:.3f}" for number in found.values())]
            for width, found in by_width.items()
        ]
        for moment, panel in zip(("start", "change"), axes[2 * index : 2 * index + 2], strict=True):
            for key in next(iter(by_width.values())):
                if key.endswith(moment):
                    numbers = [found[key] for found in by_width.values()]
                    panel.plot(list(by_width), numbers, marker=".", label=key.split(",")[0])
            panel.set_title(f"{factor}, {moment}", fontsize="medium")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_ylim(1 / 8, 2)  # wide, so that what is flat looks flat
            panel.set_xlabel("width")
            panel.legend()
    pictures.save(figure, options.out.with_suffix(".png"))
    write_json(options.out, {"root mean squares": results})
    print(markdown(["factor", "width", *next(iter(by_width.values()))], rows, texts=1))


def sizes(setting: Setting, contestant: Contestant) -> dict[str, float]:
    """Trains, and measures activations before and after.

    Args:
        setting: The run.
        contestant: Its optimizer.

    Returns:
        Root mean squares by name: of each block's output and of the logits at the start, and of
        their change.
    """
    start, steps, _ = compiled(dataclasses.replace(setting, seed=0), contestant, TEXT)
    windows = TEXT.draw(setting, 0, STEPS)
    look = jax.jit(lambda params: activations(setting, params, windows[0, :, :-1]))
    state = start(jax.random.key(setting.seed))
    before = look(state[0])
    state, _ = steps(state, windows, setting.learning_rate, setting.rho)
    after = look(state[0])
    root_mean_square = {f"{name}, start": _size(x) for name, x in before.items()}
    return root_mean_square | {
        f"{name}, change": _size(after[name] - before[name]) for name in after
    }


def activations(setting: Setting, params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    """Computes what each block returns, and the logits."""
    model = nnx.merge(structure_of(setting, TEXT), params)
    found: dict[str, jax.Array] = {}
    x = rms_norm(model.embedding(tokens))
    for index, block in enumerate(model.blocks.layers):
        found[f"block {index}"] = x = block(x)
    return found | {"logits": model(tokens)}


def _size(x: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


if __name__ == "__main__":
    main()
