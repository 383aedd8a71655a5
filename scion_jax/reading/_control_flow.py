"""Control flow: programs inside of programs, read with the values that they are called with.

A loop is read until what it carries does not change any more; only the last reading counts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core

from scion_jax.reading._axes import changed, moved
from scion_jax.reading._constants import constant, fold
from scion_jax.reading._elementwise import FLAT, unknown
from scion_jax.reading._meetings import settle
from scion_jax.reading._steps import Step, after, differentiable
from scion_jax.reading._uses import Operation, Uses
from scion_jax.reading._values import NONE, Constant, Data, Value, Weight, combined
from scion_jax.reading._views import Move

Rule = Callable[[Uses, Operation, Sequence[Value]], Any]
Read = tuple[Value, Step | None]  # a value, and the step that made it, if it has a gradient

_MOST_READINGS = 8
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat2": "jaxpr", "checkpoint": "jaxpr", "shard_map": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr", "run_state": "jaxpr",
    "custom_lin": "jaxpr", "call": "call_jaxpr",
}  # fmt: skip


class Reader:
    """Reads jaxprs.

    Attributes:
        uses: What was found.
        rules: How to follow each primitive, by name.
    """

    def __init__(self, rules: Mapping[str, Rule], apart: bool = False) -> None:
        self.uses = Uses(apart)
        self.rules = rules
        self._inside = {"scan": self._scan, "while": self._while, "cond": self._cond}
        self._transposed: dict[Any, bool] = {}

    def read(self, program: Any, inputs: Sequence[Read]) -> list[Read]:
        """Reads a jaxpr, closed or not, with values for its inputs; returns its outputs."""
        jaxpr, uses = getattr(program, "jaxpr", program), self.uses
        constants = [(constant(array), None) for array in getattr(program, "consts", ())]
        known: dict[Any, Read] = dict(zip(jaxpr.invars, inputs, strict=True))
        known.update(zip(jaxpr.constvars, constants, strict=True))

        def look_up(atom: Any) -> Read:
            return (constant(atom.val), None) if isinstance(atom, core.Literal) else known[atom]

        transposed = uses.transposed
        for equation in jaxpr.eqns:
            uses.equation = equation
            uses.transposed = transposed or self._is_transposed(equation.source_info.name_stack)
            results = self._follow(equation, [look_up(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
            uses.transposed = transposed
        return [look_up(atom) for atom in jaxpr.outvars]

    def _is_transposed(self, names: Any) -> bool:
        if id(names) not in self._transposed:
            self._transposed[id(names)] = "transpose(" in str(names)
        return self._transposed[id(names)]

    def _follow(self, equation: Any, inputs: Sequence[Read]) -> list[Read]:
        name, uses = equation.primitive.name, self.uses
        if name in _CALLS and _CALLS[name] in equation.params:
            return self._call(name, equation, inputs)
        if name in self._inside:
            return self._inside[name](equation.params, inputs)
        values = [value for value, _ in inputs]
        shapes = [atom.aval.shape for atom in equation.invars]
        count = len(equation.outvars)
        shape = equation.outvars[0].aval.shape if count else ()
        operation = Operation(name, equation.params, shapes, shape, count)
        if all(isinstance(value, Constant) for value in values):
            return [(fold(operation, values), None)] * count  # pyright: ignore[reportArgumentType]
        is_flat = name in FLAT and not uses.inside_custom
        uses.step = Step([] if is_flat else [step for _, step in inputs if step is not None])
        results = self.rules.get(name, unknown)(uses, operation, values)
        results = results if isinstance(results, list) else [results]
        if uses.transposed:
            results = [v._replace(cotangent=True) if isinstance(v, Data) else v for v in results]
        pairs = zip(results, equation.outvars, strict=True)
        return [(value, uses.step if differentiable(atom) else None) for value, atom in pairs]

    def _call(self, name: str, equation: Any, inputs: Sequence[Read]) -> list[Read]:
        program = equation.params[_CALLS[name]]
        jaxpr = getattr(program, "jaxpr", program)
        before = self.uses.inside_custom
        self.uses.inside_custom = before or name.startswith("custom")
        self.uses.callers.append(equation)
        if name == "shard_map":  # each device sees its part of an axis
            inputs = _resized(inputs, equation.invars, jaxpr.invars)
        outputs = self.read(program, inputs)
        if name == "shard_map":
            outputs = _resized(outputs, jaxpr.outvars, equation.outvars)
        self.uses.callers.pop()
        self.uses.inside_custom = before
        if name.startswith("custom"):  # its derivative is its own
            steps = [step for _, step in inputs]
            return [(value, after([step, *steps])) for value, step in outputs]
        return outputs

    def _scan(self, params: Any, inputs: Sequence[Read]) -> list[Read]:
        fixed, carried = _scan_counts(params)
        program, ends = params["jaxpr"], fixed + carried
        rows = []
        for (value, step), atom in zip(inputs[ends:], program.jaxpr.invars[ends:], strict=True):
            n = atom.aval.shape
            rows.append((moved(value, Move(range(1, len(n) + 1), (1, *n), n)), step))
        read = functools.partial(self._read_body, program, inputs[:fixed], rows)
        carry, results = self._repeated(read, inputs[fixed:ends])
        outputs = zip(results[carried:], program.jaxpr.outvars[carried:], strict=True)
        for (value, step), atom in outputs:
            n = atom.aval.shape
            stack = Move([None, *range(len(n))], n, (params["length"], *n))
            carry.append((moved(value, stack), step))
        return carry

    def _while(self, params: Any, inputs: Sequence[Read]) -> list[Read]:
        inputs = inputs[params["cond_nconsts"] :]
        fixed, program = params["body_nconsts"], params["body_jaxpr"]
        read = functools.partial(self._read_body, program, inputs[:fixed], ())
        return self._repeated(read, inputs[fixed:])[0]

    def _read_body(self, program: Any, fixed: Any, rows: Any, carry: Any) -> list[Read]:
        return self.read(program, [*fixed, *carry, *rows])

    def _repeated(
        self, read: Callable[..., list[Read]], starts: Sequence[Read]
    ) -> tuple[list[Read], list[Read]]:
        """Reads the body of a loop until what it carries is always the same."""
        steps = [after([step]) for _, step in starts]
        carry, results = [self._carried(value) for value, _ in starts], []
        for _ in range(_MOST_READINGS):
            known = len(self.uses.found), len(self.uses.notes)
            results = read(zip(carry, steps, strict=True))
            ends = [self._carried(value) for value, _ in results[: len(carry)]]
            pairs = list(zip(carry, ends, strict=True))
            if list(map(self._joined, pairs, steps)) == carry:
                break
            self.uses.forget(*known)
            carry = list(map(self._joined, pairs, steps))
        else:
            results = read(zip(carry, steps, strict=True))
            for value, self.uses.step in zip(carry, steps, strict=True):
                if isinstance(value, Weight):
                    self.uses.refuse(value.views, "a loop changes it")
        for step, (_, end) in zip(steps, results, strict=False):
            step.before.extend([end] if end else [])
        return list(zip(carry, steps, strict=True)), results

    def _carried(self, value: Value) -> Value:
        if isinstance(value, Constant):
            return Constant()
        if isinstance(value, Data):
            self.uses.consume(value.views)
            return value._replace(views=NONE, flat=NONE, onehot=NONE, traces=NONE)
        return value

    def _cond(self, params: Any, inputs: Sequence[Read]) -> list[Read]:
        branches = [self.read(branch, inputs[1:]) for branch in params["branches"]]
        joined = []
        for outputs in zip(*branches, strict=True):
            step = after(step for _, step in outputs)
            joined.append((self._joined([value for value, _ in outputs], step), step))
        return joined

    def _joined(self, values: Sequence[Value], step: Step) -> Value:
        """One of several values: what holds for all of them."""
        uses, self.uses.step = self.uses, step
        weights = [value for value in values if isinstance(value, Weight)]
        datas = [value for value in values if isinstance(value, Data)]
        if not datas and weights:
            views = {view: None for weight in weights for view in weight.views}
            data = [weight.data for weight in weights if weight.data]
            return Weight(tuple(views), combined(data) if data else None)
        among = datas[0] if datas else None
        datas += [settle(uses, weight, among) for weight in weights]
        return combined(datas)._replace(onehot=NONE) if datas else Constant()


def _resized(values: Sequence[Read], old: Sequence[Any], new: Sequence[Any]) -> list[Read]:
    resized = []
    for (value, step), *atoms in zip(values, old, new, strict=True):
        before, now = (atom.aval.shape for atom in atoms)
        sizes = {d: n for d, (m, n) in enumerate(zip(before, now, strict=True)) if m != n}
        if sizes:
            spread = operator.methodcaller("spread", sizes)
            value = changed(value, spread, range(len(now)))
        resized.append((value, step))
    return resized


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Counts the constants and the carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants.vals), len(carried.vals)
