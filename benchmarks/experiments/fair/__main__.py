"""Dev driver."""

import sys

from benchmarks.experiments.fair.entrants import ENTRANTS
from benchmarks.experiments.fair.search import Search
from benchmarks.experiments.fair.trials import Ledger, Trial
from benchmarks.experiments.records import RESULTS

ledger = Ledger(RESULTS / "fair.json", ENTRANTS)
for name in sys.argv[1:] or ENTRANTS:
    e = ENTRANTS[name]
    t = Trial(name, tuple(sorted(e.knobs.items())))
    best = Search(ledger, e, 28, 2).best(t)
    print(name, best, ledger.losses([best]), flush=True)
