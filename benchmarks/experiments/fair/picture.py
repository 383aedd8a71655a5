"""A picture of the fair comparison: loss over the learning rate, by optimizer and width."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.experiments import pictures
from benchmarks.experiments.fair.search import RATE, scaled, seeded
from benchmarks.experiments.fair.trials import Ledger, Trial

FACTORS = [2.0**exponent for exponent in range(-4, 5)]


def draw_widths(ledger: Ledger, best: Mapping[str, Mapping[int, Trial]], path: Path) -> None:
    """Draws what the ledger has beside the best learning rates, a panel for each optimizer.

    Args:
        ledger: The runs.
        best: The best trials, by optimizer and width.
        path: The file.
    """
    figure, axes = pictures.panels(len(best), "Validation loss after tuning, by width")
    for (name, found), panel in zip(best.items(), axes, strict=False):
        for (width, trial), color in zip(found.items(), pictures.shades(len(found)), strict=True):
            grid = {
                dict(tried.knobs)[RATE]: ledger.losses([tried])[0]
                for tried in (scaled(trial, factor) for factor in FACTORS)
                if tried in ledger
            }
            losses = ledger.losses(seeded(trial, 3))
            pictures.draw_grid(panel, grid, losses, f"width {width}", color)
        panel.set_title(name)
        panel.legend()
    figure.supylabel("validation loss (nats)", fontsize="medium")
    pictures.save(figure, path)
