"""The benchmarks: that they measure what they say."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("flax")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import jax

import memory

TINY = ("--width", "32", "--layers", "1", "--heads", "2", "--sequence", "16")


def buffer_bytes(tree):
    return memory.array_bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.ndim])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "plain", "accumulated"),
    [
        ("adamw", 2, 3),
        ("scion", 1, 2),
        ("scion, bfloat16", 0.5, 1.5),
        ("scion_light", 1, 1),
        ("scion_light, bfloat16", 0.5, 0.5),
    ],
)
def test_optimizer_state_is_a_number_of_buffers(name, plain, accumulated):
    settings = memory.default_settings(*TINY)
    for microbatches, buffers in ((1, plain), (4, accumulated)):
        _, state = memory.make_step(settings, name, microbatches)
        expected = buffers * buffer_bytes(state.params)
        assert buffer_bytes(state.optimizer) == expected
        assert memory.array_bytes(state.optimizer) <= expected + 32  # counts


def test_muon_holds_a_second_buffer_for_what_adam_trains():
    _, state = memory.make_step(memory.default_settings(*TINY), "muon", 1)
    params = state.params
    expected = buffer_bytes(params) + buffer_bytes([params["embedding"], params["head"]])
    coefficients = 12  # of the Newton–Schulz polynomial
    assert buffer_bytes(state.optimizer) == expected + coefficients


def test_donated_step_needs_no_second_copy_of_its_state():
    settings = memory.default_settings(*TINY)
    usage = memory.measure(settings, "scion_light", 4)
    tokens = 4 * settings.batch * (settings.sequence + 1)
    overhead = usage.step - usage.temporaries - usage.params - usage.state - tokens
    assert 0 <= overhead < 200  # the loss, and the addresses of results


def test_table_and_records_compare_like_with_like():
    usages = {
        (name, microbatches): memory.Usage(2**20, size * 2**20, 2**20, (size + 2) * 2**20)
        for microbatches in (1, 4)
        for size, name in enumerate(memory.CASES, start=microbatches)
    }
    assert "| `scion_light`, bfloat16 | 4 | 1.0 | 9.0 | 1.0 | 11.0 | 1.38 |" in memory.table(usages)
    assert {
        "benchmark": "memory: whole step",
        "case": "scion_light, 4 microbatches",
        "ours": 10.0,
        "peer": 6.0,
        "peer_name": "adamw",
        "ratio": 1.6667,
        "unit": "MiB",
    } in memory.records(usages)
