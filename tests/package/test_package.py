"""The package as a whole: its modules and classes, what it imports, what it requires."""

import dataclasses
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import scion_jax
from scion_jax import ExactPolar, Norm

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = {
    found.name: importlib.import_module(found.name)
    for found in pkgutil.walk_packages(scion_jax.__path__, "scion_jax.")
}


def test_no_module_is_shadowed_by_what_is_in_it():
    for path, module in MODULES.items():
        parent, _, name = path.rpartition(".")
        assert getattr(sys.modules[parent], name) is module, path


def test_it_imports_no_framework():
    """Nor does reading a program."""
    code = "import sys, jax.numpy as jnp, scion_jax\n"
    code += "scion_jax.infer_norms(lambda p, x: (x @ p).sum(), jnp.ones((3, 2)), jnp.ones((1, 3)),"
    code += " last=None)\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "scion_jax" in found
    assert not found & {"equinox", "flax", "haiku", "keras", "maxtext", "tensorflow", "torch"}


def test_values_are_frozen_and_hashable():
    """Optimizers close over them, and `static_args` and `functools.cache` take them."""
    values = [value for module in MODULES.values() for value in vars(module).values()]
    found = {kind for kind in values if isinstance(kind, type) and dataclasses.is_dataclass(kind)}
    found = {kind for kind in found if kind.__module__ in MODULES}
    assert len(found) > 15
    assert not {kind.__name__ for kind in found if not kind.__dataclass_params__.frozen}
    assert ExactPolar() == ExactPolar()
    assert hash(ExactPolar()) == hash(ExactPolar())


def test_what_a_norm_has_to_define():
    hooks = {"unit_lmo", "unit_gauge", "unit_dual_norm", "unit_init"}
    assert Norm.__abstractmethods__ == hooks


# The oldest versions that pyproject.toml allows are those that .ci/run tests with.


def versions(requirements, operator):
    """Maps names to versions, of the requirements that have the form `name operator version`."""
    texts = [text.strip() for text in requirements if isinstance(text, str)]
    pairs = [re.fullmatch(rf"(\w+){operator}([\d.]+)", text) for text in texts]
    return dict(pair.groups() for pair in pairs if pair)


def test_constraints_are_the_lower_bounds():
    oldest = versions(PROJECT["project"]["dependencies"], ">=")
    assert oldest.keys() == {"jax", "optax"}  # no framework
    assert "optional-dependencies" not in PROJECT["project"]  # a wheel says what users install only
    flax = versions(PROJECT["dependency-groups"]["examples"], ">=")["flax"]
    constraints = versions((ROOT / ".ci" / "oldest.txt").read_text().splitlines(), "==")
    assert constraints == {**oldest, "jaxlib": oldest["jax"], "flax": flax}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert all(f"{name} ({oldest[name.lower()]} or later)" in readme for name in ("JAX", "Optax"))
