"""What the TPU's compiler makes of an update, in a process of its own: tests run without a TPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import hlo

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


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs the group 'compiled'")
def test_figures_for_eight_chips():
    command = [sys.executable, "-m", "benchmarks.compiled", "--topology", "v5e:2x4"]
    command += ["--layers", "8", "--width", "128", "--optimizers", "scion"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    row = next(line for line in done.stdout.splitlines() if line.startswith("| `scion`"))
    assert "| 6 all-to-all |" in row
    assert float(row.split(" | ")[1]) > 0  # Mcycles
