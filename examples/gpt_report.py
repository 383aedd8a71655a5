"""What a run leaves behind for its reader: the losses as a CSV file and as a picture."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into a file; no display is needed
from matplotlib import pyplot

SMOOTHING = 25  # steps over which the picture averages the training loss


@dataclass
class History:
    """The losses of a run in nats per token.

    Attributes:
        train: The training loss of every step.
        validation: The validation loss after some numbers of steps.
    """

    train: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Returns the losses in a form that JSON can hold."""
        return {"train": self.train, "validation": list(self.validation.items())}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "History":
        """Returns the losses that `as_json` put into ``stored``."""
        return cls(list(stored["train"]), dict(stored["validation"]))


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
        writer.writerow(["step", "train_loss", "validation_loss"])
        for step, loss in enumerate(history.train, start=1):
            writer.writerow([step, loss, history.validation.get(step, "")])


def plot_losses(history: History, path: Path, title: str, unit: str) -> None:
    """Draws both losses over the steps.

    Args:
        history: The losses; at least one step.
        path: The picture to write (PNG).
        title: What stands above it.
        unit: The name of a token.
    """
    train = np.asarray(history.train)
    window = min(SMOOTHING, len(train))
    smooth = np.convolve(train, np.full(window, 1 / window), mode="valid")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
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
    axes.set(title=title, xlabel="step", ylabel=f"loss (nats per {unit})")
    # The first steps are far above the rest and would flatten it.
    axes.set_ylim(bottom=0.95 * smooth.min(), top=1.05 * max(np.quantile(train, 0.98), train[-1]))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)
