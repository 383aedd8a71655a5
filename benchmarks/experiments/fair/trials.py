"""A run of the fair comparison, and the file that keeps them all.

Knobs, start and the number of steps are arguments of the compiled function: everything of one
shape is compiled once.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from tqdm import tqdm

from benchmarks.experiments.fair.entrants import FIXED, STARTS, Entrant, start
from benchmarks.experiments.records import write_json
from benchmarks.experiments.text import TEXT, batches, corpus, even_windows
from benchmarks.experiments.training import Setting, loss_of

DECAYED = 0.285  # the part of the steps, at the end, over which the learning rate falls to 0
WINDOWS = 512  # to validate on
ROUND = 1024  # room for the batches of a run comes in multiples of this, for the same program


@dataclass(frozen=True)
class Trial:
    """Everything that a run depends on, beside the entrant's code.

    Attributes:
        entrant: The name of an optimizer.
        knobs: Its hyperparameters, and where it starts: names and numbers, sorted.
        seed: Of the start and the batches.
        width: Of the residual stream, a multiple of 64.
        steps: Of the run.
        batch: Sequences in a step.
        layers: Blocks.
        sequence: Bytes in a sequence.
    """

    entrant: str
    knobs: tuple[tuple[str, float], ...]
    seed: int = 0
    width: int = 64
    steps: int = 122
    batch: int = 32
    layers: int = 2
    sequence: int = 32

    def turned(self, **knobs: float) -> "Trial":
        """Returns the same with some knobs turned."""
        return dataclasses.replace(self, knobs=tuple(sorted((dict(self.knobs) | knobs).items())))

    def shape(self) -> tuple[Any, ...]:
        """Returns what the compiled program depends on."""
        fixed = tuple((name, value) for name, value in self.knobs if name in FIXED)
        room = -(-self.steps // ROUND) * ROUND
        return self.entrant, fixed, self.width, self.batch, self.layers, self.sequence, room


class Ledger:
    """The losses of all trials so far: read from a file, or made and written there."""

    def __init__(self, path: Path, entrants: Mapping[str, Entrant]) -> None:
        """Opens the file, or begins a new one."""
        self.path, self._entrants = path, entrants
        self._losses: dict[Trial, tuple[float, float]] = {}
        if path.exists():
            for run in json.loads(path.read_text())["runs"]:
                knobs = tuple(sorted(run["setting"].pop("knobs").items()))
                trial = Trial(knobs=knobs, **run["setting"])
                self._losses[trial] = run["loss"], run["seconds"]
        self._bar = tqdm(initial=len(self._losses), unit="run", leave=False)

    def __contains__(self, trial: Trial) -> bool:
        """Whether a trial has been made."""
        return trial in self._losses

    def losses(self, trials: Iterable[Trial]) -> list[float]:
        """Returns the validation losses at the end; infinite where a run diverged."""
        found = []
        for trial in trials:
            if trial not in self._losses:
                self._make(trial)
            loss, _ = self._losses[trial]
            found.append(loss if np.isfinite(loss) else np.inf)
        return found

    def _make(self, trial: Trial) -> None:
        self._bar.set_description(f"{trial.entrant} {trial.width}")
        self._losses[trial] = run(trial, self._entrants[trial.entrant])
        runs = [
            {"setting": vars(trial) | {"knobs": dict(trial.knobs)}, "loss": loss, "seconds": used}
            for trial, (loss, used) in self._losses.items()
        ]
        write_json(self.path, {"runs": runs})
        self._bar.update()


def run(trial: Trial, entrant: Entrant) -> tuple[float, float]:
    """Trains a model.

    Args:
        trial: What, and how.
        entrant: The optimizer.

    Returns:
        The validation loss at the end, and the processor's seconds, without compiling.
    """
    begin, train = compiled(trial.shape(), entrant)
    room = trial.shape()[-1]
    drawn = np.zeros((room, trial.batch, trial.sequence + 1), np.int32)
    setting = Setting("", 0.0, seed=trial.seed, batch=trial.batch, sequence=trial.sequence)
    drawn[: trial.steps] = batches(setting, 0, trial.steps)
    knobs = {name: jnp.float32(value) for name, value in trial.knobs if name not in FIXED}
    params = begin(jax.random.key(trial.seed), {name: knobs[name] for name in STARTS})
    arguments = params, knobs, drawn, jnp.int32(trial.steps)
    program = train.lower(*arguments).compile()
    before = time.process_time()
    loss = float(program(*arguments))
    return round(loss, 5), round(time.process_time() - before, 2)


@functools.lru_cache(maxsize=4)
def compiled(shape: tuple[Any, ...], entrant: Entrant) -> tuple[Callable, Any]:
    """Compiles whole runs, from start to validation.

    Args:
        shape: Of the trial; see `Trial.shape`.
        entrant: Its optimizer.

    Returns:
        Two functions: the parameters from a random key and knobs; the loss at the end from
        parameters, knobs, batches and the number of steps.
    """
    _, fixed, width, batch, layers, sequence, _ = shape
    setting = Setting("", 0.0, width=width, batch=batch, layers=layers, sequence=sequence)
    loss = loss_of(setting, TEXT)
    held_out = even_windows(corpus()[1], WINDOWS, sequence + 1)

    def begin(key: jax.Array, knobs: dict[str, Any]) -> Any:
        params = nnx.state(TEXT.make_model(setting, nnx.Rngs(key)), nnx.Param)
        return start(key, params, knobs)

    def train(params: Any, knobs: dict[str, Any], drawn: jax.Array, steps: jax.Array) -> jax.Array:
        knobs = knobs | dict(fixed)
        optimizer = entrant.build(lambda count: knobs["learning rate"] * fall(count, steps), knobs)
        optimizer = optax.with_extra_args_support(optimizer)

        def step(index: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
            params, memory = state
            gradient = jax.grad(loss)(params, drawn[index])
            updates, memory = optimizer.update(gradient, memory, params)
            return optax.apply_updates(params, updates), memory

        params, _ = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
        return loss(params, held_out)

    return jax.jit(begin), jax.jit(train)


def fall(count: ArrayLike, steps: ArrayLike) -> jax.Array:
    """Returns the learning rate as a part of its largest: 1, then linearly to 0 at the end."""
    left = jnp.asarray(steps) - jnp.asarray(count)
    return jnp.clip(left / jnp.maximum(1, jnp.round(DECAYED * jnp.asarray(steps))), 0.0, 1.0)
