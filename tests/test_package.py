"""The package as a whole."""

import importlib
import pkgutil
import sys

import scion_jax


def test_no_module_is_shadowed_by_what_is_in_it():
    for found in pkgutil.walk_packages(scion_jax.__path__, "scion_jax."):
        module = importlib.import_module(found.name)
        parent, _, name = found.name.rpartition(".")
        assert getattr(sys.modules[parent], name) is module, found.name
