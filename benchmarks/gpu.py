"""What an update costs on a GPU, and what training a GPT of 124 million parameters comes to.

    python -m benchmarks.gpu            # at most eight minutes; also writes out/benchmarks/gpu.json
    python -m benchmarks.gpu --small    # the same at a toy size, for a CPU, in a minute

Three parts, each written as soon as it is done:

1. the time of an update on block trees of 12 × 768, 24 × 1,024 and 16 × 2,048, ours beside
   `optax.contrib.muon` and `optax.adamw`;
2. the share that the optimizer has in a whole training step of the GPT, 65,536 tokens in four
   microbatches, bfloat16 products: the step with each optimizer, and with plain SGD in its place;
3. 300 steps of that GPT on the sources of Python's standard library, a token for two bytes, with
   `unconstrained_scion` and Muon at the settings that the fair comparison found at width 64.

Where the time does not suffice, part 3 makes fewer steps, and says so.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.block_trees import COMPARED, LEARNING_RATE, block_shapes, gaussian_like
from benchmarks.experiments.records import write_json
from benchmarks.experiments.text import even_windows
from benchmarks.gpt import BUILDS, SGD, SMALL, TRAINED, Size, begin, loss_of, step_of, tokens_of
from benchmarks.reporting import alternating_times, machine, markdown, medians
from benchmarks.step_time import update_call
from examples.nanogpt import random_windows

OPTIMIZERS = COMPARED | {"optax.adamw": optax.adamw(LEARNING_RATE)}
HELD_OUT = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes after each part, and prints tables.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a toy size, for a CPU")
    parser.add_argument("--json", type=Path, default=Path("out/benchmarks/gpu.json"))
    options = parser.parse_args(arguments)
    size = SMALL if options.small else Size()
    end = time.perf_counter() + size.seconds
    results: dict[str, Any] = {"size": dataclasses.asdict(size)}
    print(machine())

    results["update, ms"] = {}
    for layers, width in size.trees:
        results["update, ms"][f"{layers} × {width}"] = update_times(layers, width, size.rounds)
        write_json(options.json, results)
    show("Time of an update (ms)", results["update, ms"])

    results["training step, ms"] = step_times(size)
    write_json(options.json, results)
    show(f"A training step, {size.tokens:,} tokens (ms)", {"GPT": results["training step, ms"]})

    results["training"] = {}
    for index, name in enumerate(TRAINED):
        left = (end - time.perf_counter()) / (len(TRAINED) - index)
        each = results["training step, ms"][name] / 1000
        results["training"][name] = train(size, name, each, left)
        write_json(options.json, results)
    show("Validation loss (nats per token)", results["training"])


def show(heading: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """Prints a table: a row for each case, a column for each figure."""
    titles = list(next(iter(found.values())))
    rows = [[case, *(f"{row[title]:.3f}" for title in titles)] for case, row in found.items()]
    print(f"\n{heading}\n\n{markdown(['', *titles], rows)}", flush=True)


def update_times(layers: int, width: int, rounds: int) -> dict[str, float]:
    """Measures the time of an update of each optimizer, in milliseconds."""
    shapes = block_shapes(layers, width)
    params, gradient = gaussian_like(shapes, seed=0), gaussian_like(shapes, seed=1)
    calls = {name: update_call(each, params, gradient) for name, each in OPTIMIZERS.items()}
    times = medians(alternating_times(calls, rounds))
    return {name: round(1000 * seconds, 4) for name, seconds in times.items()}


def step_times(size: Size) -> dict[str, float]:
    """Measures a whole training step, in milliseconds, and the share of an optimizer in it.

    The share is what a step takes longer than with SGD, which reads and writes parameters, too.
    """
    shape = size.microbatches, size.batch, size.sequence + 1
    windows = np.random.default_rng(0).integers(size.vocabulary, size=shape, dtype=np.int32)
    times: dict[str, float] = {}
    for name in BUILDS:  # one after the other: two states may not fit beside each other
        step = step_of(size, name)
        state = jax.block_until_ready(step(begin(size, name), windows, size.steps))
        found = []
        for _ in range(size.rounds):
            before = time.perf_counter()
            state = jax.block_until_ready(step(state, windows, size.steps))
            found.append(time.perf_counter() - before)
        del state
        times[name] = round(1000 * statistics.median(found), 4)
    shares = {
        f"{name}, share": round(1 - times[SGD] / times[name], 4) for name in times if name != SGD
    }
    return times | shares


def train(size: Size, name: str, each: float, seconds: float) -> dict[str, float]:
    """Trains the GPT at the settings carried over.

    Args:
        size: Of everything.
        name: The optimizer.
        each: The seconds of a step.
        seconds: That it may take.

    Returns:
        Steps made, validation loss, and milliseconds a step.
    """
    tokens = tokens_of(size)
    text, held_out = np.split(tokens, [round((1 - HELD_OUT) * len(tokens))])
    length, rows = size.sequence + 1, size.microbatches * size.batch
    steps = min(size.steps, max(1, int(0.8 * seconds / each)))
    step, state = step_of(size, name), begin(size, name)
    before = time.perf_counter()
    for index in range(steps):
        windows = random_windows(text, 0, index, rows, length)
        state = step(state, windows.reshape(size.microbatches, size.batch, length), steps)
    jax.block_until_ready(state)
    each = (time.perf_counter() - before) / steps
    loss, rows = jax.jit(loss_of(size)), even_windows(held_out, 4 * size.batch, length)
    losses = [float(loss(state[0], batch)) for batch in np.split(rows, 4)]
    return {"steps": steps, "loss": statistics.mean(losses), "ms a step": round(1000 * each, 2)}


if __name__ == "__main__":
    main()
