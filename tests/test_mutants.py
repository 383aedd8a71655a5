"""What .ci/mutants goes by: the tests that a module has, and the changes that none can notice."""

import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scion_jax"
TABLE = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())


def essence(code):
    found = importlib.util.spec_from_file_location("mutations", ROOT / ".ci" / "mutations.py")
    mutations = importlib.util.module_from_spec(found)
    found.loader.exec_module(mutations)
    return mutations.essence(code)


def test_every_module_has_its_tests():
    assert TABLE.keys() == {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    for module, names in TABLE.items():
        assert names, module
        for name in names:
            assert (ROOT / "tests" / f"test_{name}.py").is_file(), (module, name)


def test_what_is_explained_is_still_there():
    text = (ROOT / "tests" / "mutants.md").read_text()
    rows = re.findall(r"^\| `(.+?)` \| `.*?` \| `(.*?)` → ", text, re.MULTILINE)
    assert rows
    for module, before in rows:
        lines = " ⏎ ".join(line.strip() for line in essence((PACKAGE / module).read_text()))
        assert before.replace("\\|", "|").strip("…") in lines, (module, before)
