"""Whatever tree of parameters and gradients comes in, it works, or is refused in our words.

What is drawn as good has to work, and what is drawn as bad has to be named.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st

import scion_jax
from tests.support import arguments, inputs
from tests.support.arguments import argument, one_of, shape
from tests.support.inputs import with_leaf
from tests.support.refusals import check_stable, outcome, random_cases, traced, types

pytestmark = pytest.mark.unoptimized

OPTIMIZERS = [
    *(scion_jax.scion, scion_jax.unconstrained_scion, scion_jax.clipped_scion),
    *(scion_jax.unconstrained_clipped_scion, scion_jax.scion_light, scion_jax.almond),
]
OTHER_LEAVES = {  # of gradients
    "same": lambda leaf: st.just(leaf),
    "other dtype": lambda leaf: arguments.FLOATS.map(lambda d: shape(*leaf.shape, dtype=d)),
    "other shape": lambda leaf: st.just(shape(*leaf.shape, 2)),
    "no gradient": lambda leaf: arguments.NO_PARAMETERS,
    "missing": lambda leaf: one_of(None, optax.MaskedNode(), {}, ()),
    "more": lambda leaf: st.just([leaf, leaf]),
}


@st.composite
def gradients(draw, params):
    """Gradients, and what is wrong with them for these parameters."""
    kind = draw(one_of("same", "containers", *OTHER_LEAVES))
    if not jax.tree.leaves(params):
        return params, ()
    if kind == "containers":
        grads = draw(one_of([params], {"a": params}, jax.tree.leaves(params)))
        same = jax.tree.structure(grads) == jax.tree.structure(params)
        return grads, () if same else ("the gradients",)
    grads, path = draw(with_leaf(params, OTHER_LEAVES[kind]))
    # A leaf in place of which there are two is named as what they are in.
    return grads, () if kind in ("same", "other dtype") else (path, path[:-1] + "/")


@random_cases(60, build=one_of(*OPTIMIZERS), case=inputs.cases(), data=st.data())
def test_optimizers(build, case, data):
    values = data.draw(arguments.arguments(build))
    grads, with_params, bad, certain = case.params, True, case.bad, case.certain
    fault = "" if bad else data.draw(one_of("", "gradients", "argument", "no params"))
    fault = "no params" if case.params is None else fault
    if fault == "gradients":
        grads, bad = data.draw(gradients(case.params))
    if fault == "argument":
        values, bad = data.draw(arguments.arguments(build, fault=True))
    if fault == "no params":
        with_params, bad, certain = False, ("params",), False

    def steps(params, grads):
        optimizer = build(norms=case.norms, param_labels=case.param_labels, **values)
        state = optimizer.init(params)
        updates, after = optimizer.update(grads, state, params if with_params else None)
        return state, after, updates

    result = outcome(lambda: traced(steps, case.params, grads), bad, certain)
    if result is not None:
        state, after, updates = result
        check_stable(state, after)
        assert types(updates) == types(case.params)


STAGES = [
    scion_jax.scale_by_lmo,
    lambda norm: scion_jax.measure_pairing(scion_jax.scale_by_lmo(norm)),
    lambda norm: scion_jax.clip_by_pairing(scion_jax.scale_by_lmo(norm), 1.0),
    lambda norm: scion_jax.average_gradients(0.1),
    lambda norm: scion_jax.average_gradients(0.1, jnp.bfloat16),
]


@random_cases(20, build=one_of(*STAGES), case=inputs.cases(["single"]), data=st.data())
def test_stages(build, case, data):
    params, bad, certain = case.params, (*case.bad, "the gradients"), False
    if case.bad and data.draw(st.booleans()):
        params, path = data.draw(with_leaf(params, lambda _: arguments.NO_PARAMETERS))
        bad, certain = (*case.bad, path), True
    grads, more = data.draw(gradients(case.params))
    with_params = data.draw(st.booleans())

    def steps(params, grads):
        stage = build(case.norms)
        state = stage.init(params)
        _, after = stage.update(grads, state, params if with_params else None)
        return state, after

    result = outcome(lambda: traced(steps, params, grads), (*bad, *more), certain)
    if result is not None:
        check_stable(*result)


@random_cases(20, case=inputs.cases(), data=st.data())
def test_diagnostics(case, data):
    name = data.draw(one_of("gauges", "dual_norm", "gauge_bounds", "frank_wolfe_gap", "describe"))
    trees, bad, more = (case.params,), case.bad, {}
    if name == "frank_wolfe_gap":
        grads, no_gradients = (case.params, ()) if bad else data.draw(gradients(case.params))
        trees, bad = (case.params, grads), (*bad, *no_gradients)
    if name == "gauge_bounds" and not bad:
        more["shard_over"], bad = data.draw(argument("shard_over"))

    def call(*trees):
        function = getattr(scion_jax, name)
        result = function(*trees, case.norms, case.param_labels, **more)
        return None if name == "describe" and str(result) else result

    outcome(lambda: traced(call, *trees), bad, case.certain)


@random_cases(20, case=inputs.cases(), data=st.data())
def test_starting_points(case, data):
    key, no_key = data.draw(argument("key"))
    bad = (*case.bad, *no_key)
    certain = case.certain or bool(no_key)
    if not certain or not bad:  # how a vector starts is not known from its shape
        bad, certain = (*bad, *inputs.paths_of(case.params)), False

    def call(params=case.params):
        return scion_jax.init_params(key, params, case.norms, case.param_labels)

    traces = data.draw(one_of(lambda: traced(call, case.params), lambda: jax.eval_shape(call)))
    result = outcome(traces, bad, certain)
    if result is not None:
        assert types(result) == types(case.params)
