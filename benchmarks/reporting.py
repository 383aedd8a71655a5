"""What all benchmarks share: measuring in turns, and tables and records of the results."""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax

Key = TypeVar("Key")
Result = TypeVar("Result")
Record = dict[str, Any]

LEAST_ROUNDS = 3  # a median of fewer says nothing


def alternate(calls: Mapping[Key, Callable[[], Result]], rounds: int) -> dict[Key, list[Result]]:
    """Makes each call once per round, so that all see the same hours of a shared machine.

    The order is drawn anew for each round: no call always follows the same other, whose threads may
    still be spinning and whose data fill the caches.

    Args:
        calls: What to call.
        rounds: How often.

    Returns:
        The results of each call, one per round.
    """
    order = random.Random(0)
    results: dict[Key, list[Result]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key in order.sample(list(calls), len(calls)):
            results[key].append(calls[key]())
    return results


def seconds(call: Callable[[], Any]) -> float:
    """Returns how long a call takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def alternating_times(
    calls: Mapping[Key, Callable[[], Any]], rounds: int
) -> dict[Key, list[float]]:
    """Times calls in turns, after one untimed call of each, which compiles.

    Args:
        calls: What to time.
        rounds: How often.

    Returns:
        The seconds of each call, one number per round.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    return alternate({key: lambda call=call: seconds(call) for key, call in calls.items()}, rounds)


def medians(results: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Returns the median of each sequence."""
    return {key: statistics.median(numbers) for key, numbers in results.items()}


def record(
    benchmark: str, case: str, ours: float, peer_name: str, peer: float, unit: str
) -> Record:
    """Writes down one comparison for other programs.

    Args:
        benchmark: What was measured.
        case: Of what, and which of ours.
        ours: Our figure.
        peer_name: Whom it is compared with.
        peer: The peer's figure, from the same run.
        unit: The unit of both.

    Returns:
        The fields, and the ratio of ours to the peer's: below 1 ours is smaller. None if the peer's
        is zero.
    """
    return {
        "benchmark": benchmark,
        "case": case,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "peer_name": peer_name,
        "ratio": round(ours / peer, 4) if peer else None,
        "unit": unit,
    }


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Formats a Markdown table.

    Args:
        titles: The title of each column.
        rows: The cells.
        texts: How many columns, from the left, hold text; the others are aligned as numbers.

    Returns:
        The lines.
    """
    rules = "|" + "---|" * texts + "--:|" * (len(titles) - texts)
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return "\n".join([lines[0], rules, *lines[1:]])


def machine() -> str:
    """Returns one line about what the figures were measured on."""
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores; device {jax.devices()[0].device_kind}; "
        f"JAX {jax.__version__}, jaxlib {version('jaxlib')}, optax {optax.__version__}, "
        f"Python {platform.python_version()}"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def make_parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Starts the command line of a benchmark.

    Args:
        description: What ``--help`` says first.
        rounds: The default of ``--rounds``; None if nothing is repeated.

    Returns:
        A parser that knows ``--json``, and ``--rounds`` if anything is repeated.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write records there")
    if rounds:
        text = f"measurements of each figure, whose median counts (default: {rounds})"
        parser.add_argument("--rounds", type=_rounds, default=rounds, metavar="N", help=text)
    return parser


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(f"at least {LEAST_ROUNDS}, for a median; got {rounds}")
    return rounds


def report(
    heading: str, tables: Sequence[str], records: Sequence[Record], path: Path | None
) -> None:
    """Prints the tables below one line about the machine, and writes the records.

    Args:
        heading: What was measured, in a line.
        tables: The tables.
        records: The comparisons.
        path: Where the records go, as JSON; None for nowhere.
    """
    print(machine(), heading, *tables, sep="\n\n")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(records), indent=1) + "\n")
