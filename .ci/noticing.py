"""Who notices a change, for .ci/mutants: the tests that run a line, and a run of them beside it.

Each run of tests is forked from a server that has imported JAX, Optax and Flax, but not yet our
library: that is most of what a quick test costs.
"""

import bisect
import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "mutants"

# A change makes another program, so nothing that was compiled for one serves another. The library
# itself must not be among the modules: it is imported anew, with its change, from a copy.
_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_COMPILATION_CACHE_DIR": str(OUT / "compiled"),
}
_MODULES = ["jax.numpy", "optax", "flax.linen", "flax.nnx", "hypothesis", "pytest"]


class Reach:
    """Which tests ran which lines, and how long each took: recorded once, by `record`."""

    def __init__(self):
        import coverage

        data = coverage.CoverageData(str(OUT / "coverage"))
        data.read()
        self._sources = {}  # as they were then
        self._tests = {}  # by module and line
        for path in data.measured_files():
            module = path.rpartition("scion_jax/")[2]
            self._sources[module] = (OUT / "sources" / module).read_text()
            self._tests[module] = {
                line: {context.rpartition("|")[0] for context in contexts if context}
                for line, contexts in data.contexts_by_lineno(path).items()
            }
        self.seconds = {}
        for case in xml.etree.ElementTree.parse(OUT / "tests.xml").iter("testcase"):
            file = case.get("classname").replace(".", "/") + ".py"
            self.seconds[f"{file}::{case.get('name')}"] = float(case.get("time"))

    @staticmethod
    def record(jobs):
        """Runs all tests but the slow ones, and records."""
        shutil.rmtree(OUT / "sources", ignore_errors=True)
        shutil.copytree(ROOT / "scion_jax", OUT / "sources")
        command = [sys.executable, "-m", "pytest", "-q", f"--numprocesses={jobs}", "--cov"]
        command += ["--cov-context=test", "--cov-report=", "--cov-fail-under=0"]
        command += [f"--junitxml={OUT / 'tests.xml'}"]
        # Python 3.14 is the first whose quicker core tells tests apart.
        changed = {"COVERAGE_FILE": str(OUT / "coverage"), "COVERAGE_CORE": "ctrace"}
        if subprocess.run(command, cwd=ROOT, env=os.environ | changed).returncode:
            (OUT / "tests.xml").unlink(missing_ok=True)
            sys.exit("the tests have to pass without any change")

    @functools.cached_property
    def newer(self):
        """The tests that have been written since."""
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
        found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return [name for name in found.stdout.splitlines() if "::" in name and name not in self]

    def __contains__(self, test):
        return test in self.seconds

    def tests(self, module, lines, definition):
        """Lists the tests that ran a statement, else its definition, else its module."""
        ran = self._tests.get(module, {})
        if self._sources.get(module) == (ROOT / "scion_jax" / module).read_text():
            for some in (lines, definition):
                if found := set().union(*(ran.get(line, ()) for line in some)):
                    return found
        return set().union(*ran.values())


def order(tests, seconds, noticed, patience):
    """Puts those first that noticed the most before, then one case of each test, quick ones first.

    Args:
      tests: Names.
      seconds: What each takes.
      noticed: How often each noticed something like this, for those that did.
      patience: How many seconds to fill; the first test counts however long it takes.
    """
    by_function = collections.defaultdict(list)
    for test in sorted(tests, key=lambda test: (seconds.get(test, 1.0), test)):
        by_function[test.partition("[")[0]].append(test)
    rank = {test: i for cases in by_function.values() for i, test in enumerate(cases)}
    ranked = sorted(
        tests, key=lambda test: (-noticed[test], rank[test], seconds.get(test, 1.0), test)
    )
    spent = [0.0, *itertools.accumulate(seconds.get(test, 1.0) for test in ranked)]
    count = max(min(1, len(ranked)), bisect.bisect_right(spent, patience) - 1)
    return ranked[:count], spent[count]


class Copy:
    """A copy of this checkout, in which a module is changed and tests run."""

    _times = itertools.count(10**9)

    def __init__(self, folder):
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        paths = subprocess.run(listed, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        for path in filter(None, paths.stdout.split("\0")):
            if (ROOT / path).is_file():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, folder / path)

    @contextlib.contextmanager
    def changed(self, module, code):
        """Has a module's code changed."""
        self._write(module, code)
        try:
            yield
        finally:
            self._write(module, (ROOT / "scion_jax" / module).read_text())

    def _write(self, module, code):
        path = self.folder / "scion_jax" / module
        path.write_text(code)
        # A time of its own, or Python might take the bytecode of another mutant for this one's.
        os.utime(path, times=(next(self._times),) * 2)

    def first_failure(self, tests, limit):
        """Runs tests; returns the name of the first that fails, or what ended the run, or ""."""
        receiving, sending = _server().Pipe(duplex=False)
        process = _server().Process(target=_run, args=(str(self.folder), tests, sending))
        process.start()
        sending.close()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            return "no end"
        with contextlib.suppress(EOFError):  # nothing was sent
            return receiving.recv()
        files = {test.partition("::")[0] for test in tests}
        if process.exitcode == 4 and files != set(tests):  # what is tested has other names now
            return self.first_failure(sorted(files), limit)
        return "" if process.exitcode == 0 else f"exit code {process.exitcode}"


@functools.cache
def _server():
    os.environ.update(_SETTINGS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    return context


class _Failures:
    """A plugin that sends the name of the first test that fails."""

    def __init__(self, sending):
        self.sending = sending

    def pytest_runtest_logreport(self, report):
        if report.failed and self.sending:
            self.sending.send(report.nodeid)
            self.sending = None

    pytest_collectreport = pytest_runtest_logreport


def _run(folder, tests, sending):
    os.chdir(folder)
    sys.path.insert(0, folder)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    import pytest

    # Plugins of pytest that the server has imported: their own assertions are of no interest.
    known = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *known]
    sys.exit(pytest.main([*options, *tests], plugins=[_Failures(sending)]))
