"""Which variables a gradient of the outputs reaches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from scion_jax.reading._elementwise import FLAT

CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat2": "jaxpr", "checkpoint": "jaxpr", "shard_map": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr", "run_state": "jaxpr",
    "custom_lin": "jaxpr", "call": "call_jaxpr",
}  # fmt: skip


def body(parameter: Any) -> tuple[Any, Sequence[Any]]:
    """Takes a jaxpr apart, closed or not: the jaxpr, and its constants."""
    return getattr(parameter, "jaxpr", parameter), getattr(parameter, "consts", ())


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Counts the constants and the carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants.vals), len(carried.vals)


class Liveness:
    """Finds live variables, each jaxpr once for each set of live outputs."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, frozenset[Any]]] = {}

    def variables(
        self, jaxpr: Any, outputs: Sequence[bool], custom: bool = False
    ) -> frozenset[Any]:
        """Finds the variables that a gradient reaches, if it reaches these outputs.

        Args:
            jaxpr: The program.
            outputs: Which of its outputs a gradient reaches.
            custom: Whether the program has a derivative of its own, so that nothing stops it.
        """
        key = id(jaxpr), tuple(outputs), custom
        if key not in self._known:
            live = {v for v, is_live in zip(jaxpr.outvars, outputs, strict=True) if is_live}
            live = {v for v in live if differentiable(v)}
            for equation in reversed(jaxpr.eqns):
                reached = [v in live for v in equation.outvars]
                if any(reached):
                    live.update(self._inputs(equation, reached, custom))
            self._known[key] = jaxpr, frozenset(live)
        return self._known[key][1]

    def _inputs(self, equation: Any, outputs: Sequence[bool], custom: bool) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        inputs = list(equation.invars)
        if name in FLAT and not custom:
            return []
        if name in CALLS:
            jaxpr, _ = body(params[CALLS[name]])
            if not name.startswith("custom"):
                live = self.variables(jaxpr, outputs, custom)
                pairs = zip(jaxpr.invars, inputs, strict=True)
                return [v for inner, v in pairs if inner in live and differentiable(v)]
        elif name == "scan":
            inputs = self._scan(params, inputs, outputs, custom)
        elif name == "while":
            inputs = inputs[params["cond_nconsts"] :]
        return [v for v in inputs if differentiable(v)]

    def _scan(
        self, params: Any, inputs: list[Any], outputs: Sequence[bool], custom: bool
    ) -> list[Any]:
        jaxpr, _ = body(params["jaxpr"])
        live = self.variables(jaxpr, scan_outputs(self, params, outputs, custom), custom)
        return [v for inner, v in zip(jaxpr.invars, inputs, strict=True) if inner in live]


def scan_outputs(
    liveness: Liveness, params: Any, outputs: Sequence[bool], custom: bool
) -> list[bool]:
    """Finds the live outputs of a scan's body: what is carried is live if it is ever so."""
    jaxpr, _ = body(params["jaxpr"])
    constants, carried = scan_counts(params)
    outputs = list(outputs)
    for _ in range(carried + 1):
        live = liveness.variables(jaxpr, outputs, custom)
        after = [v in live for v in jaxpr.invars[constants : constants + carried]]
        merged = [a or b for a, b in zip(outputs, after, strict=False)] + outputs[carried:]
        if merged == outputs:
            break
        outputs = merged
    return outputs


def differentiable(atom: Any) -> bool:
    """Whether a variable has a gradient at all."""
    return isinstance(atom, core.Var) and _is_inexact(getattr(atom.aval, "dtype", None))


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))
