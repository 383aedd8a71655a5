"""A fair comparison, once for all, by one command:

    python -m benchmarks.experiments.fair                        # all parts, one after the other
    python -m benchmarks.experiments.fair --parts widths --sizes 64 128
    python -m benchmarks.experiments.fair --optimizers muon scion

Everybody gets the same budget: learning rate in factors of 2, momentum with and without a look
ahead, where parameters start, and two knobs of their own, tuned once at width 64 and carried over.
Runs are kept as they are made, so that a command goes on where it was stopped, and prints what is
there at once.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments.fair.entrants import ENTRANTS
from benchmarks.experiments.fair.next_steps import entrants
from benchmarks.experiments.fair.parts import PARTS
from benchmarks.experiments.fair.trials import Ledger
from benchmarks.experiments.records import RESULTS
from benchmarks.reporting import markdown


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts, and prints their tables.

    Args:
        arguments: The command line without the program's name; None means ``sys.argv``.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "the JSON file of the runs (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=RESULTS / "fair.json", help=text)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--optimizers", nargs="+", default=list(ENTRANTS), choices=ENTRANTS)
    parser.add_argument("--sizes", type=int, nargs="+", help="widths, or batches, of one part")
    options = parser.parse_args(arguments)
    ledger = Ledger(options.out, ENTRANTS | entrants())
    sizes = [options.sizes] if options.sizes else []
    for part in options.parts:
        table = PARTS[part](ledger, options.optimizers, *sizes)
        print(f"{table.heading}\n\n{markdown(table.titles, table.rows)}\n", flush=True)


if __name__ == "__main__":
    main()
