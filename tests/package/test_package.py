"""The package as a whole."""

import dataclasses
import importlib
import pkgutil
import subprocess
import sys

import scion_jax
from scion_jax import ExactPolar, Norm


def test_no_module_is_shadowed_by_what_is_in_it():
    for found in pkgutil.walk_packages(scion_jax.__path__, "scion_jax."):
        module = importlib.import_module(found.name)
        parent, _, name = found.name.rpartition(".")
        assert getattr(sys.modules[parent], name) is module, found.name


def test_importing_it_imports_no_framework():
    code = "import sys, scion_jax; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "scion_jax" in found
    assert not found & {"equinox", "flax", "haiku", "keras", "maxtext", "tensorflow", "torch"}


def classes():
    for found in pkgutil.walk_packages(scion_jax.__path__, "scion_jax."):
        module = importlib.import_module(found.name)
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == found.name:
                yield value


def test_values_are_frozen_and_hashable():
    """Optimizers close over them, and `static_args` and `functools.cache` take them."""
    found = [kind for kind in classes() if dataclasses.is_dataclass(kind)]
    assert len(found) > 15
    assert not {kind.__name__ for kind in found if not kind.__dataclass_params__.frozen}
    assert ExactPolar() == ExactPolar()
    assert hash(ExactPolar()) == hash(ExactPolar())


def test_what_a_norm_has_to_define():
    hooks = {"unit_lmo", "unit_gauge", "unit_dual_norm", "unit_init"}
    assert Norm.__abstractmethods__ == hooks
