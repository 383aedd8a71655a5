"""Results of an experiment: a JSON file that grows by one run at a time.

Stop an experiment whenever you like: a run that the file has already is not made again. Delete the
file to begin anew.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.experiments.optimizers import CONTESTANTS, Contestant
from benchmarks.experiments.text import TEXT
from benchmarks.experiments.training import Outcome, Setting, Task, train
from benchmarks.reporting import machine

RESULTS = Path(__file__).parents[1] / "results"


class Records:
    """The runs of an experiment, made or read."""

    def __init__(
        self,
        path: Path,
        contestants: Mapping[str, Contestant] = CONTESTANTS,
        task: Task = TEXT,
    ) -> None:
        """Opens the file, or begins a new one.

        Args:
            path: The JSON file.
            contestants: Optimizers by name.
            task: What they learn.
        """
        self.path = path
        self.contestants = contestants
        self._task = task
        self._runs: dict[Setting, Outcome] = {}
        if path.exists():
            for run in json.loads(path.read_text())["runs"]:
                self._runs[Setting(**run["setting"])] = Outcome(**run["outcome"])
        self._bar = tqdm(initial=len(self._runs), unit="run", leave=False)

    def run(self, settings: Iterable[Setting]) -> dict[Setting, Outcome]:
        """Returns the outcomes of some runs; those that are missing are made."""
        outcomes = {}
        for setting in settings:
            if setting not in self._runs:
                self._bar.set_description(f"{setting.contestant} {setting.learning_rate:g}")
                contestant = self.contestants[setting.contestant]
                self._runs[setting] = train(setting, contestant, self._task)
                self._write()
                self._bar.update()
            outcomes[setting] = self._runs[setting]
        return outcomes

    def _write(self) -> None:
        runs = [
            {"setting": dataclasses.asdict(setting), "outcome": dataclasses.asdict(outcome)}
            for setting, outcome in self._runs.items()
        ]
        write_json(self.path, {"runs": runs})


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Replaces a file by results and what they were made with, whole or not at all."""
    everything = {"machine": machine(), "commit": commit(), **results}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    # A line for each run, so that a file can be read and compared.
    text = json.dumps(everything, ensure_ascii=False).replace('{"setting"', '\n{"setting"')
    temporary.write_text(text + "\n")
    os.replace(temporary, path)


def commit() -> str:
    """Returns the commit that the code is at, with a `+` if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    result = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


class Tuned(NamedTuple):
    """What tuning a learning rate came to.

    Attributes:
        best: The setting with the best learning rate and the first seed.
        grid: The loss by learning rate, infinite where a run diverged, with the first seed.
        outcomes: Of the best learning rate, one for each seed.
    """

    best: Setting
    grid: dict[float, float]
    outcomes: list[Outcome]

    @property
    def losses(self) -> list[float]:
        """The final losses of all seeds at the best learning rate."""
        return [outcome.loss for outcome in self.outcomes]

    def summary(self) -> list[str]:
        """The best learning rate, and the loss with its standard deviation over seeds."""
        rate = f"2^{round(math.log2(self.best.learning_rate))}"
        at_an_end = self.best.learning_rate in (min(self.grid), max(self.grid))
        deviation = statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0
        loss = f"{statistics.mean(self.losses):.4f} ± {deviation:.4f}"
        return [rate + (" (an end of the grid)" if at_an_end else ""), loss]


def tune(records: Records, setting: Setting, seeds: int = 3, around: float | None = None) -> Tuned:
    """Finds the best learning rate of a grid in factors of 2, and runs it with more seeds.

    Args:
        records: Where runs are kept.
        setting: The rest of the setting.
        seeds: How many for the best learning rate.
        around: Where to begin. Instead of the whole grid it and its neighbours are tried, and so
            on from the best one until both neighbours are worse.

    Returns:
        The best learning rate, and what was tried.
    """

    def loss(rate: float) -> float:
        run = dataclasses.replace(setting, learning_rate=rate)
        return records.run([run])[run].loss

    if around is None:
        grid = {rate: loss(rate) for rate in records.contestants[setting.contestant].grid()}
    else:
        best, grid = around, {around: loss(around)}
        while not {best / 2, best * 2} <= grid.keys():
            grid |= {rate: loss(rate) for rate in (best / 2, best * 2)}
            best = min(grid, key=grid.__getitem__)
    rate = min(grid, key=grid.__getitem__)
    best_runs = [
        dataclasses.replace(setting, learning_rate=rate, seed=setting.seed + index)
        for index in range(seeds)
    ]
    outcomes = records.run(best_runs)
    return Tuned(best_runs[0], dict(sorted(grid.items())), list(outcomes.values()))


def make_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Starts the command line of an experiment.

    Args:
        description: What ``--help`` says first.
        name: Of its JSON file and its picture.

    Returns:
        A parser that knows ``--out`` and ``--seeds``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "the JSON file of the runs, beside which the picture is drawn (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help=text)
    parser.add_argument("--seeds", type=int, default=3, help="at the best point (default: 3)")
    return parser
