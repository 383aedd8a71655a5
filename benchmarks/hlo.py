"""Reads compiled HLO text: what is executed, how often, and what the compiler says it costs.

A compiler's own totals count the body of a loop once. Here every instruction comes with the number
of times that it is executed: loops by their rounds, and an error where these are unknown.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = re.compile(r"[a-z]+?(\d+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COUNTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        name: What it is called.
        result: Type of its result.
        opcode: What it does.
        rest: Operands and attributes.
        is_root: Whether it is its computation's result.
    """

    name: str
    result: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def kind(self) -> str:
        """The opcode, the two halves of something asynchronous counting as one."""
        return self.opcode.removesuffix("-start")

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def bytes(self) -> int:
        """Size of the result; of something asynchronous without its operands."""
        shapes = _SHAPE.findall(self.result)
        if self.opcode.endswith("-start") and self.opcode != "all-reduce-start":
            shapes = shapes[len(self.operands) :]
        return sum(_entries(shape) * _itemsize(dtype) for dtype, shape in shapes)

    @property
    def cycles(self) -> int:
        """What the TPU's compiler expects it to take."""
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', self.rest)[:1]))


def _entries(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size)


def _itemsize(dtype: str) -> float:
    bits = _BITS.match(dtype)
    return 1 if dtype == "pred" or bits is None else int(bits[1]) / 8


class Module:
    """A compiled program."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations[header[2]] = {}
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                is_root = line.startswith("  ROOT ")
                current[found[1]] = Instruction(found[1], *found.groups()[1:], is_root)

    def executed(self) -> Iterator[tuple[Instruction, int, Instruction | None]]:
        """Yields what the program executes, how often at most, and on which choice it depends.

        Fusions count as one instruction; of choices (`conditional`) within others the outer one.
        """
        yield from self._executed(self.entry, 1, None)

    def _executed(
        self, computation: str, times: int, choice: Instruction | None
    ) -> Iterator[tuple[Instruction, int, Instruction | None]]:
        for instruction in self.computations[computation].values():
            yield instruction, times, choice
            if instruction.opcode == "while":
                rounds = times * self.rounds(instruction, computation)
                yield from self._executed(_named(instruction, "body"), rounds, choice)
            elif instruction.opcode == "call":
                yield from self._executed(_named(instruction, "to_apply"), times, choice)
            elif instruction.opcode == "conditional":
                for branch in self._branches(instruction):
                    yield from self._executed(branch, times, choice or instruction)

    def _branches(self, instruction: Instruction) -> list[str]:
        listed = re.search(r"branch_computations=\{(.*?)\}", instruction.rest)
        if listed:
            return re.findall(r"%([\w.\-]+)", listed[1])
        return [_named(instruction, f"{kind}_computation") for kind in ("true", "false")]

    def rounds(self, loop: Instruction, computation: str) -> int:
        """Finds how often the body of a loop is executed.

        Args:
            loop: A `while`.
            computation: Where it stands.

        Returns:
            The number, as the compiler says it or as a counter with constant bounds says.

        Raises:
            ValueError: If neither is there.
        """
        if counted := _COUNTED.search(loop.rest):
            return int(counted[1])
        body, condition = (_named(loop, part) for part in ("body", "condition"))
        root = self._root(condition)
        try:
            if root.opcode != "compare" or "direction=LT" not in root.rest:
                raise ValueError(f"its condition is {root.opcode}")
            index = self._position(root.operands[0], condition)
            carried = self.computations[computation][loop.operands[0]].operands
            first = self._constant(carried[index], computation)
            last = self._bound(root.operands[1], condition, carried, computation)
            step = self._step(index, body, carried, computation)
        except (ValueError, KeyError, IndexError) as error:
            raise ValueError(f"the rounds of the loop {loop.name} are unknown: {error}") from error
        return max(0, -(-(last - first) // step))

    def _root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation].values() if i.is_root)

    def _position(self, name: str, computation: str) -> int:
        """Finds which element of a loop's state a value is."""
        found = self.computations[computation][name]
        while found.opcode in ("copy", "bitcast"):
            found = self.computations[computation][found.operands[0]]
        index = re.search(r"index=(\d+)", found.rest)
        if found.opcode != "get-tuple-element" or index is None:
            raise ValueError(f"{name} is no part of its state")
        return int(index[1])

    def _constant(self, name: str, computation: str) -> int:
        found = self.computations[computation][name]
        while found.opcode in ("copy", "bitcast"):
            found = self.computations[computation][found.operands[0]]
        value = re.match(r"(-?\d+)\)", found.rest)
        if found.opcode != "constant" or value is None:
            raise ValueError(f"{name} is no constant")
        return int(value[1])

    def _bound(self, name: str, inside: str, carried: list[str], outside: str) -> int:
        try:
            return self._constant(name, inside)
        except ValueError:
            return self._constant(carried[self._position(name, inside)], outside)

    def _step(self, index: int, body: str, carried: list[str], outside: str) -> int:
        operands = self._root(body).operands
        following = self.computations[body][operands[index]]
        while following.opcode in ("copy", "bitcast"):
            following = self.computations[body][following.operands[0]]
        if following.opcode != "add":
            raise ValueError(f"its counter is set by {following.opcode}")
        return self._bound(following.operands[1], body, carried, outside)

    @functools.cache  # noqa: B019 (lives as long as the module)
    def parts(self, instruction: Instruction) -> tuple[tuple[Instruction, str], ...]:
        """Lists what is in a fusion, or the instruction itself, with where each part stands."""
        inside = instruction.called("calls")
        if inside is None or inside not in self.computations:
            return ()
        found: list[tuple[Instruction, str]] = []
        for part in self.computations[inside].values():
            found.append((part, inside))
            found.extend(self.parts(part))
        return tuple(found)

    def products(self, instruction: Instruction, computation: str) -> int:
        """Counts the floating-point operations of a matrix product."""
        entries = sum(_entries(shape) for _, shape in _SHAPE.findall(instruction.result)[:1])
        left = self.computations[computation][instruction.operands[0]]
        sizes = [int(size) for size in _SHAPE.findall(left.result)[0][1].split(",") if size]
        if labels := re.search(r"dim_labels=(\w+)_\w+->(\w+)", instruction.rest):
            # An axis that the window takes whole, once, is summed over; others are TPUs' batches.
            shape = [int(n) for n in _SHAPE.findall(instruction.result)[0][1].split(",")]
            window = re.search(r"window=\{size=([\dx]+)", instruction.rest)
            taken = [int(size) for size in window[1].split("x")] if window else []
            summed = [n for k, n in enumerate(taken) if shape[labels[2].index(str(k))] == 1]
            return 2 * entries * sizes[labels[1].index("f")] * math.prod(summed)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        axes = contracted[1].split(",") if contracted else [str(len(sizes) - 1)]
        return 2 * entries * math.prod(sizes[int(axis)] for axis in axes if axis)


def _named(instruction: Instruction, attribute: str) -> str:
    name = instruction.called(attribute)
    if name is None:
        raise ValueError(f"{instruction.name} names no {attribute}")
    return name


@dataclass
class Choice:
    """What is executed in the branches of a `conditional`.

    Attributes:
        dtype: Of the largest array that it chooses by, as in `bf16`.
        shape: That array's shape.
        times: How often a branch is executed.
        phase: How many collectives the program has before it, for which all devices wait.
        cycles: As the TPU's compiler estimates them, for all times and branches.
        cycles_in_products: Those of matrix products, with what is fused to them.
        flops: Floating-point operations of matrix products.
    """

    dtype: str
    shape: tuple[int, ...]
    times: int
    phase: int
    cycles: int = 0
    cycles_in_products: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Cost:
    """What a program executes on one device, if it executes all branches of its choices.

    Attributes:
        cycles: As the TPU's compiler estimates them; 0 from other compilers.
        cycles_in_products: Those of matrix products, with what is fused to them.
        flops: Floating-point operations of matrix products.
        collectives: How often each kind is executed.
        collective_bytes: Size of their results.
        kernels: Fusions, products, copies and calls.
        choices: What of this stands in branches.
    """

    cycles: int
    cycles_in_products: int
    flops: int
    collectives: Counter[str]
    collective_bytes: int
    kernels: int
    choices: list[Choice]


_KERNELS = ("fusion", "dot", "convolution", "copy", "custom-call", "reduce", "sort", "transpose")


def cost(text: str) -> Cost:
    """Adds up what a compiled program executes.

    Args:
        text: Optimized HLO.

    Returns:
        The sums.
    """
    module = Module(text)
    cycles = in_products = flops = size = kernels = 0
    collectives: Counter[str] = Counter()
    channels: set[str] = set()
    choices: dict[int, Choice] = {}
    places = {id(i): name for name, body in module.computations.items() for i in body.values()}
    for instruction, times, choice in module.executed():
        work = 0
        for part, place in ((instruction, places[id(instruction)]), *module.parts(instruction)):
            if part.opcode in ("dot", "convolution"):
                work += module.products(part, place)
            # A TPU may spread one collective over several fusions, all of one channel. Outside of
            # them `shard_map` gives one channel to all collectives of a kind.
            channel = re.search(r"channel_id=(\d+)", part.rest) if part is not instruction else None
            known = channel is not None and channel[1] in channels
            if part.kind in COLLECTIVES and not known:
                channels.update(channel.groups() if channel else ())
                collectives[part.kind] += times
                size += times * int(part.bytes)
        own = (times * instruction.cycles, times * instruction.cycles * bool(work), times * work)
        cycles, in_products, flops = cycles + own[0], in_products + own[1], flops + own[2]
        if instruction.opcode == "conditional" and choice is None:
            given = module.computations[places[id(instruction)]]
            types = " ".join(given[name].result for name in instruction.operands)
            dtype, shape = max(_SHAPE.findall(types), key=lambda found: _entries(found[1]))
            sizes = tuple(int(size) for size in shape.split(",") if size)
            choices[id(instruction)] = Choice(dtype, sizes, times, collectives.total())
        elif choice is not None:
            found = choices[id(choice)]
            found.cycles += own[0]
            found.cycles_in_products += own[1]
            found.flops += own[2]
        kernels += times if instruction.opcode in _KERNELS else 0
    chosen = list(choices.values())
    return Cost(cycles, in_products, flops, collectives, size, kernels, chosen)
