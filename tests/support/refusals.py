"""What to ask of whatever a user may write: that it works, or is refused as it should be."""

import pathlib
import traceback
import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings

import scion_jax
from tests.support.arguments import OwnError

_HOME = pathlib.Path(scion_jax.__file__).parent
_OPTAX_ITSELF = "requires the current value of parameters"  # all optimizers that need `params`


def random_cases(ci, **strategies):
    """Makes a test of a property: so many cases in CI, ten times as many in the slow suite."""

    def decorate(prove):
        @pytest.mark.parametrize("count", [ci, pytest.param(10 * ci, marks=pytest.mark.slow)])
        def test(count):
            settings(max_examples=count)(given(**strategies)(prove))()

        return test

    return decorate


def outcome(call, bad=(), certain=True):
    """Calls; returns the result, or None if it was refused as it should be.

    Args:
        call: What to call.
        bad: What is wrong with it: an error has to name one of these. With nothing, none may come.
        certain: Whether an error has to come otherwise.
    """
    filtering = jax.config.jax_traceback_filtering
    # Else JAX leaves its own frames out, and what it raises looks like ours.
    jax.config.update("jax_traceback_filtering", "off")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*(is used by no leaf|is the first match of no leaf)"
            )
            warnings.filterwarnings("ignore", "momentum is 1 minus the usual momentum")
            result = call()
    except Exception as error:
        if why := _reproach(error, bad):
            raise AssertionError(why) from error
        return None
    finally:
        jax.config.update("jax_traceback_filtering", filtering)
    assert not (bad and certain), f"nothing was said of {bad}"
    return result


def _reproach(error, bad):
    """Says what is wrong with an error, if anything is."""
    if not bad:
        return "it should have worked"
    if any(name in note for note in getattr(error, "__notes__", ()) for name in bad):
        return ""  # what a user's schedule raises comes through, with a note that says which
    if isinstance(error, OwnError) and "param_labels" in bad:
        return ""  # and from a user's function of labels, which is in the traceback
    if _OPTAX_ITSELF in str(error) and "params" in bad:
        return ""
    if not isinstance(error, ValueError | TypeError):
        return f"a {type(error).__name__}"
    if not any(name in str(error) for name in bad):
        return f"it names none of {bad}"
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return "" if pathlib.Path(last).is_relative_to(_HOME) else f"it comes from {last}"


def traced(function, *trees):
    """Calls with trees in which traced arrays stand for shapes, and the rest for itself."""
    leaves, structure = jax.tree.flatten(trees)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def call(arrays):
        filled = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        return function(*structure.unflatten(filled.values()))

    return jax.eval_shape(call, [leaves[i] for i in places])


def types(tree):
    """Shapes and dtypes, of NumPy's arrays what JAX makes of them."""
    dtype = jax.dtypes.canonicalize_dtype
    return jax.tree.map(lambda x: (np.shape(x), dtype(x.dtype)), tree)


def check_stable(before, after):
    """Checks that a step with the state after it is the one that was compiled before."""
    assert types(before) == types(after)
    weak = [[leaf.weak_type for leaf in jax.tree.leaves(state)] for state in (before, after)]
    assert weak[0] == weak[1]
