"""Control flow: programs inside of programs, read with the values that they are called with.

A loop is read until what it carries does not change any more; only the last reading counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core

from scion_jax.reading._constants import constant, fold
from scion_jax.reading._elementwise import unknown
from scion_jax.reading._live import CALLS, Liveness, body, scan_counts, scan_outputs
from scion_jax.reading._uses import Uses
from scion_jax.reading._values import Constant, Data, Value, Weight, changed, combined, moved

Rule = Callable[[Uses, Any, Sequence[Value]], Any]

_MOST_READINGS = 8


class Reader:
    """Reads jaxprs.

    Attributes:
        uses: What was found.
        rules: How to follow each primitive, by name.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self.uses = Uses()
        self.rules = rules
        self.liveness = Liveness()
        self._transposed: dict[Any, bool] = {}

    def read(
        self, jaxpr: Any, constants: Sequence[Any], values: Sequence[Value], outputs: Sequence[bool]
    ) -> list[Value]:
        """Reads a program.

        Args:
            jaxpr: The program.
            constants: Its constants, as arrays.
            values: Its inputs.
            outputs: Which of its outputs a gradient reaches.

        Returns:
            Its outputs.
        """
        uses = self.uses
        live = self.liveness.variables(jaxpr, outputs, uses.inside_custom)
        environment: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
        environment.update(zip(jaxpr.constvars, map(constant, constants), strict=True))

        def value_of(atom: Any) -> Value:
            return constant(atom.val) if isinstance(atom, core.Literal) else environment[atom]

        transposed = uses.transposed
        for equation in jaxpr.eqns:
            inputs = [value_of(atom) for atom in equation.invars]
            reached = [v in live for v in equation.outvars]
            uses.equation, uses.live = equation, any(reached)
            uses.transposed = transposed or self._is_transposed(equation.source_info.name_stack)
            results = self._follow(equation, inputs, reached)
            if uses.transposed:
                results = [
                    r._replace(cotangent=True) if isinstance(r, Data) else r for r in results
                ]
            environment.update(zip(equation.outvars, results, strict=True))
            uses.transposed = transposed
        return [value_of(atom) for atom in jaxpr.outvars]

    def _is_transposed(self, names: Any) -> bool:
        if id(names) not in self._transposed:
            self._transposed[id(names)] = "transpose(" in str(names)
        return self._transposed[id(names)]

    def _follow(
        self, equation: Any, values: Sequence[Value], outputs: Sequence[bool]
    ) -> Sequence[Value]:
        name = equation.primitive.name
        if name in CALLS and CALLS[name] in equation.params:
            return self._call(name, equation, values, outputs)
        if name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(equation.params, values, outputs)
        if all(isinstance(value, Constant) for value in values):
            return fold(equation, values)  # pyright: ignore[reportArgumentType]
        results = self.rules.get(name, unknown)(self.uses, equation, values)
        return results if isinstance(results, list) else [results]

    def _call(
        self, name: str, equation: Any, values: Sequence[Value], outputs: Sequence[bool]
    ) -> list[Value]:
        jaxpr, constants = body(equation.params[CALLS[name]])
        custom = self.uses.inside_custom
        self.uses.inside_custom = custom or name.startswith("custom")
        if name == "shard_map":  # each device sees its part of an axis
            values = [
                _resized(v, atom.aval.shape, inner.aval.shape)
                for v, atom, inner in zip(values, equation.invars, jaxpr.invars, strict=True)
            ]
        self.uses.callers.append(equation)
        results = self.read(jaxpr, constants, values, outputs)
        self.uses.callers.pop()
        if name == "shard_map":
            pairs = zip(results, jaxpr.outvars, equation.outvars, strict=True)
            results = [_resized(v, inner.aval.shape, o.aval.shape) for v, inner, o in pairs]
        self.uses.inside_custom = custom
        return results

    def _scan(self, params: Any, values: Sequence[Value], outputs: Sequence[bool]) -> list[Value]:
        jaxpr, constants = body(params["jaxpr"])
        fixed, carried = scan_counts(params)
        outputs = scan_outputs(self.liveness, params, outputs, self.uses.inside_custom)
        rows = [
            _row(v, a.aval.shape)
            for v, a in zip(values[fixed + carried :], jaxpr.invars[fixed + carried :], strict=True)
        ]
        before = [*values[:fixed]], values[fixed : fixed + carried]

        def read(carry: Sequence[Value]) -> list[Value]:
            return self.read(jaxpr, constants, [*before[0], *carry, *rows], outputs)

        carry, results = self._repeated(read, before[1], carried, any(outputs))
        stacked = zip(results[carried:], jaxpr.outvars[carried:], strict=True)
        return [*carry, *(_stacked(v, params["length"], a.aval.shape) for v, a in stacked)]

    def _while(self, params: Any, values: Sequence[Value], outputs: Sequence[bool]) -> list[Value]:
        jaxpr, constants = body(params["body_jaxpr"])
        fixed = values[params["cond_nconsts"] :][: params["body_nconsts"]]
        carry = values[params["cond_nconsts"] + params["body_nconsts"] :]
        live = [any(outputs)] * len(outputs)

        def read(carry: Sequence[Value]) -> list[Value]:
            return self.read(jaxpr, constants, [*fixed, *carry], live)

        return self._repeated(read, carry, len(carry), any(outputs))[0]

    def _repeated(
        self, read: Callable[..., list[Value]], carry: Sequence[Value], count: int, live: bool
    ) -> tuple[list[Value], list[Value]]:
        """Reads the body of a loop until what it carries is always the same."""
        carry = [self._carried(value) for value in carry]
        for reading in range(_MOST_READINGS):
            known = len(self.uses.found), len(self.uses.notes)
            results = read(carry)
            self.uses.live = live
            after = [self._carried(value) for value in results[:count]]
            if self._merged(carry, after) == carry:
                return carry, results
            self.uses.forget(*known)
            if reading >= _MOST_READINGS - 3:
                for value in (*carry, *after):
                    if isinstance(value, Weight):
                        self.uses.refuse(value, "a loop changes it")
                after = [Data() if isinstance(value, Weight) else value for value in after]
            carry = self._merged(carry, after)
        return list(carry), read(carry)

    def _merged(self, before: Sequence[Value], after: Sequence[Value]) -> list[Value]:
        return [self._joined([a, b]) for a, b in zip(before, after, strict=True)]

    def _carried(self, value: Value) -> Value:
        if isinstance(value, Constant):
            return Constant()
        if isinstance(value, Data):
            self.uses.consume(value.views)
            return value._replace(views=frozenset(), flat=frozenset(), onehot=frozenset())
        return value

    def _cond(self, params: Any, values: Sequence[Value], outputs: Sequence[bool]) -> list[Value]:
        live = self.uses.live
        results = []
        for branch in params["branches"]:
            jaxpr, constants = body(branch)
            results.append(self.read(jaxpr, constants, values[1:], outputs))
        self.uses.live = live
        return [self._joined(alternatives) for alternatives in zip(*results, strict=True)]

    def _joined(self, values: Sequence[Value]) -> Value:
        """One of several values: what holds for all of them."""
        known = [value for value in values if not isinstance(value, Constant)]
        if not known:
            return Constant()
        weights = [value for value in known if isinstance(value, Weight)]
        if len(weights) == len(known):
            views = {view: None for weight in weights for view in weight.views}
            data = [weight.data for weight in weights if weight.data]
            return Weight(tuple(views), combined(data) if data else None)
        parts = [value for value in known if isinstance(value, Data)]
        settle = self.uses.settle
        parts += [settle(w) if w.data else self.uses.entrywise(w, parts[0]) for w in weights]
        joined = combined(parts)
        return joined._replace(onehot=frozenset())


def _row(value: Value, shape: Sequence[int]) -> Value:
    return moved(value, range(1, len(shape) + 1), (1, *shape), shape)


def _stacked(value: Value, length: int, shape: Sequence[int]) -> Value:
    return moved(value, [None, *range(len(shape))], shape, (length, *shape))


def _resized(value: Value, old: Sequence[int], new: Sequence[int]) -> Value:
    sizes = {d: n for d, (m, n) in enumerate(zip(old, new, strict=True)) if m != n}
    return changed(value, lambda view: view.spread(sizes), range(len(old)))
