"""What a run leaves behind for its reader: losses and pairings, as a CSV file and a picture."""

import csv
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into a file; no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes

SMOOTHING = 25  # steps over which the picture averages the training loss


@dataclass
class History:
    """The losses of a run in nats per token, and what its optimizer shows.

    Attributes:
        train: The training loss of every step.
        validation: The validation loss after some numbers of steps.
        shown: Numbers from the optimizer's state, a list by step under each name.
    """

    train: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    shown: dict[str, list[float]] = field(default_factory=dict)

    def extend(self, losses: np.ndarray, shown: Mapping[str, np.ndarray]) -> None:
        """Adds some steps."""
        self.train.extend(losses.tolist())
        for name, values in shown.items():
            self.shown.setdefault(name, []).extend(values.tolist())

    def as_json(self) -> dict[str, Any]:
        """Returns everything in a form that JSON can hold."""
        return {
            "train": self.train,
            "validation": list(self.validation.items()),
            "shown": self.shown,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "History":
        """Returns the history that `as_json` put into ``stored``."""
        return cls(list(stored["train"]), dict(stored["validation"]), dict(stored["shown"]))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path that takes the place of ``path`` once it is written in full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    os.replace(temporary, path)


def write_csv(history: History, path: Path) -> None:
    """Writes a row per step; the validation loss stands where one was measured."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train_loss", "validation_loss", *history.shown])
        for step, loss in enumerate(history.train, start=1):
            shown = (values[step - 1] for values in history.shown.values())
            writer.writerow([step, loss, history.validation.get(step, ""), *shown])


def plot_history(
    history: History, path: Path, title: str, unit: str, rho: float | None = None
) -> None:
    """Draws both losses over the steps, and below them the pairing if the optimizer shows it.

    Args:
        history: At least one step.
        path: The picture to write (PNG).
        title: What stands above it.
        unit: The name of a token.
        rho: Where a clipped optimizer begins to shorten its steps; None if it does not.
    """
    pairing = history.shown.get("pairing")
    rows = 2 if pairing else 1
    figure, axes = pyplot.subplots(
        rows, figsize=(8, 1 + 4 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    axes[0, 0].set_title(title)
    draw_losses(axes[0, 0], history, unit)
    if pairing:
        draw_pairing(axes[1, 0], pairing, rho)
    axes[-1, 0].set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def draw_losses(axes: Axes, history: History, unit: str) -> None:
    """Draws both losses over the steps."""
    train = np.asarray(history.train)
    window = min(SMOOTHING, len(train))
    smooth = np.convolve(train, np.full(window, 1 / window), mode="valid")
    steps = np.arange(1, len(train) + 1)
    axes.plot(steps, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"train, mean of {window} steps")
    axes.plot(
        list(history.validation),
        list(history.validation.values()),
        color="tab:orange",
        marker="o",
        label="validation",
    )
    axes.set_ylabel(f"loss (nats per {unit})")
    # The first steps are far above the rest and would flatten it.
    axes.set_ylim(bottom=0.95 * smooth.min(), top=1.05 * max(np.quantile(train, 0.98), train[-1]))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_pairing(axes: Axes, pairing: list[float], rho: float | None) -> None:
    """Draws the pairing over the steps, and the ρ below which steps are shortened."""
    label = f"median {np.median(pairing):.3g}"
    axes.plot(np.arange(1, len(pairing) + 1), pairing, color="tab:green", lw=0.8, label=label)
    if rho is not None:
        axes.axhline(rho, color="tab:red", linestyle="--", label=rf"$\rho$ = {rho:g}")
    axes.set_yscale("log")
    axes.set_ylabel(r"pairing $\langle d, w\rangle$")
    axes.grid(alpha=0.3)
    axes.legend()
