"""Chex's variants of a function, for tests that pytest parametrizes."""

import types

import chex
import pytest

VARIANTS = ("with_jit", "without_jit", "with_device", "without_device", "with_pmap")


def variant(kind, function):
    """Applies one of `VARIANTS` to a function; see `chex.variants`."""

    def call(*args):
        results = []

        def run(self):
            results.append(self.variant(function)(*args))

        (test,) = chex.variants(run, **{kind: True})
        test(types.SimpleNamespace())
        return results[0]

    return call


every_variant = pytest.mark.parametrize("kind", VARIANTS)
