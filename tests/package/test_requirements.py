"""The oldest versions that pyproject.toml allows are those that .ci/run tests with."""

import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def versions(requirements, operator):
    """Maps names to versions, of the requirements that have the form `name operator version`."""
    pairs = [re.fullmatch(rf"(\w+){operator}([\d.]+)", text.strip()) for text in requirements]
    return dict(pair.groups() for pair in pairs if pair)


OLDEST = versions(PROJECT["project"]["dependencies"], ">=")
EXAMPLES = versions(PROJECT["dependency-groups"]["examples"], ">=")


def test_constraints_are_the_lower_bounds():
    assert OLDEST.keys() == {"jax", "optax"}  # no framework
    constraints = versions((ROOT / ".ci" / "oldest.txt").read_text().splitlines(), "==")
    assert constraints == {**OLDEST, "jaxlib": OLDEST["jax"], "flax": EXAMPLES["flax"]}


def test_a_wheel_says_what_users_install_only():
    assert "optional-dependencies" not in PROJECT["project"]


@pytest.mark.parametrize("name", ["JAX", "Optax"])
def test_the_readme_states_them(name):
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{name} ({OLDEST[name.lower()]} or later)" in readme
