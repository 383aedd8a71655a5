"""What the TPU's compiler makes of an update, in a process of its own: tests run without a TPU."""

import importlib.util
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import hlo
from benchmarks.busiest import on_busiest
from benchmarks.cases import CASES

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]

LOOP = """HloModule m

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %gram = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %y = f32[4,8]{1,0} dot(%gram, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, \
backend_config={"estimated_cycles":"10"}
  %z = f32[4,8]{1,0} all-reduce(%y), to_apply=%sum
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%next, %z)
}

%condition (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4,8]) -> (s32[], f32[4,8]) {
  %a = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(1)
  %c = f32[4,8]{1,0} copy(%a), backend_config={"estimated_cycles":"5"}
  %t = (s32[], f32[4,8]{1,0}) tuple(%zero, %c)
  ROOT %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body
}
"""


NOTHING = """%no (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  ROOT %p = (s32[], f32[4,8]{1,0}) parameter(0)
}

"""


def test_loops_count_by_their_rounds():
    cost = hlo.cost(LOOP)  # 1, 3, 5: three rounds
    assert cost.cycles == 3 * 10 + 5
    assert cost.cycles_in_products == 3 * 10
    assert cost.flops == 3 * 2 * (2 * 4 * 4 * 8)
    assert cost.collectives == {"all-reduce": 3}
    assert cost.collective_bytes == 3 * 4 * 8 * 4


def test_collectives_of_one_channel_count_each():
    again = "  %v = f32[4,8]{1,0} all-reduce(%z), channel_id=1, to_apply=%sum\n  ROOT %t"
    text = LOOP.replace("to_apply=%sum", "channel_id=1, to_apply=%sum")
    assert hlo.cost(text.replace("  ROOT %t", again, 1)).collectives == {"all-reduce": 6}


def test_unknown_rounds_are_an_error():
    with pytest.raises(ValueError, match="rounds of the loop w are unknown"):
        hlo.cost(LOOP.replace("s32[] constant(6)", "s32[] custom-call()"))


def test_the_busiest_chip_passes_over_zeros_in_its_place():
    """Of 12 Llama layers on 64 chips: gates at 24 of them, down at 12, queries at 24 others."""
    pieces = [(64, 1, 1, 64, 14336), (64, 1, 1, 224, 4096), (64, 1, 1, 64, 4096)]
    choices = [
        hlo.Choice("bf16", shape, 1, 4, cycles, cycles - 1, 10 * cycles)
        for shape, cycles in zip(pieces, (38, 37, 13), strict=True)
    ]
    case = CASES["llama-12"]
    everything = hlo.Cost(38 + 37 + 13 + 6, 85, 900, Counter(), 0, 0, choices)
    found = on_busiest(everything, case, 64)
    assert (found.cycles, found.cycles_in_products, found.flops) == (38 + 6, 85 - 48, 900 - 500)
    # All wait for a collective before the last one; then the sum counts.
    waiting = replace(everything, choices=[*choices[:2], replace(choices[2], phase=5)])
    assert on_busiest(waiting, case, 64).cycles == 38 + 13 + 6
    # Whose the work is, is not known.
    twice = replace(everything, choices=[*choices, choices[0]])
    assert on_busiest(twice, case, 64).cycles == 38 + 37 + 13 + 6 - 13
    foreign = replace(everything, choices=[replace(choices[0], shape=(4, 8))])
    assert on_busiest(foreign, case, 64) == foreign
    assert on_busiest(replace(everything, choices=[]), case, 64).cycles == everything.cycles


def test_what_stands_in_branches_is_told_apart():
    text = LOOP.replace(
        "ROOT %w = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition, body=%body",
        "%q = pred[] custom-call(%zero)\n"
        "  ROOT %w = (s32[], f32[4,8]{1,0}) conditional(%q, %t, %t), true_computation=%body, "
        "false_computation=%no",
    ).replace("ENTRY", NOTHING + "ENTRY")
    cost = hlo.cost(text)
    (choice,) = cost.choices
    assert (choice.dtype, choice.shape, choice.times, choice.phase) == ("f32", (4, 8), 1, 0)
    assert (choice.cycles, choice.cycles_in_products) == (10, 10)
    assert (cost.cycles, cost.flops, choice.flops) == (15, 512, 512)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the group 'compiled'")
def test_figures_for_eight_chips():
    command = [sys.executable, "-m", "benchmarks.compiled", "--topology", "v5e:2x4"]
    command += ["--layers", "8", "--width", "128", "--optimizers", "scion"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row = next(line for line in done.stdout.splitlines() if line.startswith("| `scion`"))
    assert "| 6 all-to-all |" in row
    assert float(row.split(" | ")[1]) > 0  # Mcycles


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the group 'compiled'")
def test_chips_without_a_matrix_of_one_stack_work_on_another_at_the_same_time():
    """4 layers on 8 chips; a collective in between would leave a quarter idle."""
    command = [sys.executable, "-m", "benchmarks.compiled", "--topology", "v5e:2x4"]
    command += ["--layers", "4", "--optimizers", "unconstrained_scion"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "unconstrained_scion: 0% of the products' time is idle" in done.stdout
