"""The examples: short files, each of which shows at once what it takes from the library."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

LINES = {"cnn": 250, "finetune": 250, "mlp": 80, "nanogpt": 200, "sharded": 100, "vit": 250}
FOLDER = Path(__file__).parents[1] / "examples"


def test_there_are_six():
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} == LINES.keys()


@pytest.mark.parametrize("name", LINES)
def test_example_is_short_and_shows_what_it_takes(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= LINES[name]
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    assert not {node.module for node in imports} & LINES.keys()
    (ours,) = [node for node in imports if node.module == "scion_jax"]
    assert ours.end_lineno <= 30
    assert {"infer_norms", "init_params"} <= {alias.name for alias in ours.names}
