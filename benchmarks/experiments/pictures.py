"""What the pictures of the experiments share."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into a file; no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "scion": "tab:blue",
    "unconstrained_scion": "tab:cyan",
    "clipped_scion": "tab:green",
    "unconstrained_clipped_scion": "tab:olive",
    "scion_light": "tab:purple",
    "almond": "tab:pink",
    "adamw": "tab:red",
    "muon": "tab:orange",
}


def panels(
    count: int, title: str, width: float = 4.2, sharey: bool = True
) -> tuple[Figure, list[Axes]]:
    """Starts a picture of some panels, in rows that can be read on a page of text."""
    columns = 3 if count == 3 else min(count, 2)
    rows = -(-count // columns)
    size = (min(width * columns, 9), 3.4 * rows)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, sharey=sharey, squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    return figure, list(axes.flat)


def shades(count: int) -> list[object]:
    """Returns colors from dark to light, for sizes in order."""
    return list(pyplot.get_cmap("viridis")(np.linspace(0, 0.85, count)))


def draw_grid(
    axes: Axes,
    losses: Mapping[float, float],
    best: Sequence[float],
    label: str,
    color: object,
) -> None:
    """Draws the loss over the learning rates of a grid, and the spread over seeds at the best.

    Args:
        axes: Where.
        losses: The loss by learning rate; a run that diverged is left out.
        best: The losses of all seeds at the best learning rate.
        label: For the legend.
        color: Of the line.
    """
    finite = {rate: loss for rate, loss in losses.items() if np.isfinite(loss)}
    axes.plot(list(finite), list(finite.values()), marker=".", color=color, label=label)
    rate = min(finite, key=finite.__getitem__)
    mean, low, high = np.mean(best), np.min(best), np.max(best)
    axes.errorbar(rate, mean, [[mean - low], [high - mean]], marker="o", capsize=4, color=color)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate")


def save(figure: Figure, path: Path) -> None:
    """Writes the picture as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    os.replace(temporary, path)
