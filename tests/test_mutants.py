"""What .ci/mutants goes by: statements and their places, and the changes that none can notice."""

import collections
import functools
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scion_jax"


def module(name):
    found = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    return made


def test_a_line_has_its_statement_and_its_definition(tmp_path, monkeypatch):
    mutations = module("mutations")
    monkeypatch.setattr(mutations, "PACKAGE", tmp_path)
    lines = ["a = (", "1)", "@b", "def c():", "if a:", "return 2", "else:", "return (", "3)"]
    indents = [0, 0, 0, 0, 1, 2, 1, 2, 2]
    code = [" " * indent + line for line, indent in zip(lines, indents, strict=True)]
    (tmp_path / "d.py").write_text("\n".join(code))
    assert mutations.spans("d.py", 2) == (range(1, 3), range(0))
    assert mutations.spans("d.py", 3) == (range(3, 5), range(3, 10))
    assert mutations.spans("d.py", 5) == (range(5, 6), range(3, 10))
    assert mutations.spans("d.py", 9) == (range(8, 10), range(3, 10))


def test_who_noticed_before_is_asked_first_then_one_case_of_each_test():
    seconds = {"a[1]": 2.0, "a[2]": 1.0, "b": 3.0, "c": 9.0}
    noticed = collections.Counter({"c": 1})
    order = functools.partial(module("noticing").order, seconds, seconds, noticed)
    assert order(patience=100) == (["c", "a[2]", "b", "a[1]"], 15.0)
    assert order(patience=13) == (["c", "a[2]", "b"], 13.0)
    assert order(patience=1) == (["c"], 9.0)


def test_what_is_explained_is_still_there():
    text = (ROOT / "tests" / "mutants.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| `.*?` \| `(.*?)` → ", text, re.MULTILINE)
    assert rows
    essence = module("mutations").essence
    for name, before in rows:
        lines = " ⏎ ".join(line.strip() for line in essence((PACKAGE / name).read_text()))
        assert before.replace("\\|", "|").strip("…") in lines, (name, before)
