"""The benchmarks: that they measure what they say."""

import dataclasses
import json
import math
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import (
    block_trees,
    compile_time,
    house,
    memory,
    orthogonalization,
    reference,
    reporting,
    step_time,
)
from benchmarks.flops import flops
from scion_jax import ExactPolar, NewtonSchulz, Spectral, orthogonalize

FIELDS = {"benchmark", "case", "ours", "peer", "peer_name", "ratio", "unit"}
SMALL = dataclasses.replace(memory.MEASURED, width=32, layers=1, sequence=16)


def read_records(path):
    """Reads records and checks their fields and ratios."""
    found = json.loads(path.read_text())
    for line in found:
        assert set(line) == FIELDS
        if line["ratio"] is not None and min(line["ours"], line["peer"]) > 0.1:  # all are rounded
            assert line["ratio"] == pytest.approx(line["ours"] / line["peer"], rel=2e-3)
    return found


# Memory.


def test_optimizer_state_is_a_number_of_buffers():
    def buffer_bytes(tree):
        return block_trees.array_bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.ndim])

    buffers = {
        "adamw": (2, 3),
        "scion": (1, 2),
        "scion, bfloat16": (0.5, 1.5),
        "scion_light": (1, 1),
        "scion_light, bfloat16": (0.5, 0.5),
    }
    for name, (plain, accumulated) in buffers.items():
        for microbatches, count in ((1, plain), (4, accumulated)):
            state = jax.eval_shape(lambda n=name, m=microbatches: memory.make_step(SMALL, n, m)[1])
            expected = count * buffer_bytes(state.params)
            assert buffer_bytes(state.optimizer) == expected
            assert block_trees.array_bytes(state.optimizer) <= expected + 32  # counts
    _, state = memory.make_step(SMALL, "muon", 1)  # has two for what its Adam trains
    params = state.params
    expected = buffer_bytes(params) + buffer_bytes([params["embedding"], params["head"]])
    assert buffer_bytes(state.optimizer) == expected + 12  # the polynomial's coefficients


def test_donated_step_needs_no_second_copy_of_its_state():
    usage = memory.measure(SMALL, "scion_light", 4)
    tokens = 4 * SMALL.batch * (SMALL.sequence + 1)
    overhead = usage.step - usage.temporaries - usage.params - usage.state - tokens
    assert 0 <= overhead < 200  # the loss, and the addresses of results


def test_temporaries_are_those_of_the_update():
    def update(updates, state, params=None):
        del params
        squares = jax.tree.map(lambda leaf: leaf @ leaf.T, updates)  # not fused, hence kept
        return jax.tree.map(lambda square, leaf: square @ leaf, squares, updates), state

    two_products = optax.GradientTransformation(optax.identity().init, update)
    assert memory.update_temporaries(optax.identity(), 16, (1,))[1] < 1000
    temporaries = memory.update_temporaries(two_products, 16, (1,))[1]
    assert temporaries >= 4 * (64 * 64)  # of the largest square at least
    layer = 12 * 8 * 8 * 4  # bytes, in which growth is told
    grown = {layers: 100 + 3 * layer * layers for layers in (2, 4, 8)}
    assert memory.growth(grown, 8) == pytest.approx(3)


def test_memory_reports_both_tables(tmp_path, monkeypatch, capsys):
    usages = {
        (name, microbatches): memory.Usage(2**20, size * 2**20, 2**20, (size + 2) * 2**20)
        for microbatches in (1, 4)
        for size, name in enumerate(memory.CASES, start=microbatches)
    }
    monkeypatch.setattr(memory, "measure", lambda settings, name, batches: usages[name, batches])
    monkeypatch.setattr(memory, "UPDATE_WIDTH", 8)
    monkeypatch.setattr(memory, "UPDATE_DEPTHS", (1, 2))
    with jax.numpy_dtype_promotion("standard"):  # Optax's own, in muon
        memory.main(["--json", str(tmp_path / "memory.json")])
    printed = capsys.readouterr().out
    assert "| `scion_light`, bfloat16 | 4 | 1.0 | 9.0 | 1.0 | 11.0 | 1.38 |" in printed
    assert "| `optax.contrib.muon` |" in printed
    found = read_records(tmp_path / "memory.json")
    assert len({line["benchmark"] for line in found}) == 4
    assert {
        "benchmark": "memory: whole step",
        "case": "scion_light, 4 microbatches",
        "ours": 10.0,
        "peer": 6.0,
        "peer_name": "adamw",
        "ratio": 1.6667,
        "unit": "MiB",
    } in found


# What the benchmarks share.


def test_each_call_has_its_turn_in_every_round():
    turns = []
    calls = {name: lambda name=name: turns.append(name) or len(turns) for name in "abc"}
    results = reporting.alternate(calls, 20)
    rounds = [tuple(turns[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 3
    for name, numbers in results.items():
        assert [turns[number - 1] for number in numbers] == [name] * 20


def test_first_call_is_not_timed(monkeypatch):
    made = []
    times = reporting.alternating_times({"a": lambda: made.append(0)}, 3)
    assert (len(made), len(times["a"])) == (4, 3)
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(reporting.time, "perf_counter", lambda: next(clock))
    assert reporting.seconds(lambda: jnp.ones(1)) == 2.5


def test_reports(capsys):
    line = reporting.record("time", "case", 1.0, "peer", 4.0, "ms")
    assert set(line) == FIELDS
    assert line["ratio"] == 0.25  # ours to the peer's
    assert reporting.record("time", "case", 1.0, "peer", 0.0, "ms")["ratio"] is None
    assert all(part in reporting.machine() for part in ("cores", "device cpu", jax.__version__))
    parser = reporting.make_parser("", rounds=7)
    assert parser.parse_args([]).rounds == 7
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", "2"])
    assert "at least 3" in capsys.readouterr().err  # a median needs three


def test_block_tree_has_the_matrices_of_gpt2():
    tree = block_trees.block_shapes(3, 8)
    assert len(tree) == 3
    shapes = [leaf.shape for leaf in jax.tree.leaves(tree["layer2"])]
    assert sorted(shapes) == [(8, 8)] * 4 + [(8, 32), (32, 8)]
    whole = jax.tree.leaves(block_trees.block_shapes(1, 8, vectors=True))
    assert sorted(leaf.shape for leaf in whole if leaf.ndim == 1) == [(8,)] * 9 + [(32,)]
    assert block_trees.array_bytes(tree) == 3 * 12 * 8 * 8 * 4
    drawn = block_trees.gaussian_like(tree, 0)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(lambda leaf: leaf.shape, tree)
    assert jnp.std(drawn["layer0"]["expand"]) == pytest.approx(1, abs=0.2)


def test_work_is_that_of_the_products():
    assert flops(NewtonSchulz("quintic", 5), 128, 128) == 5 * 3 * 2 * 128**3
    product = r"contracting_dims = \[([\d, ]*)\].*\(tensor<([\dx]+)\w+>.*-> tensor<([\dx]+)\w+>"
    for dtype in (jnp.bfloat16, jnp.float32):
        method, x = NewtonSchulz(compute_dtype=dtype), jnp.ones((32, 128))
        traced = jax.jit(lambda x, method=method: orthogonalize(x, method)).trace(x)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        work = 0
        for contracted, left, result in re.findall(rf"dot_general.*{product}", text):
            sizes, entries = (
                [int(size) for size in shape.split("x") if size] for shape in (left, result)
            )
            sums = math.prod(sizes[int(axis)] for axis in contracted.split(", "))
            work += 2 * math.prod(entries) * sums * (8 not in entries)  # but not that with ones
        assert flops(method, 32, 128) == work


def test_necessary_work_is_that_of_every_matrix():
    method = NewtonSchulz("quintic", 5)
    work = block_trees.necessary_flops(block_trees.block_shapes(3, 8), method)
    assert work == 3 * (4 * flops(method, 8, 8) + 2 * flops(method, 8, 32))
    assert Spectral().orthogonalizer == NewtonSchulz()  # the default row's, in step_time


def test_update_call_is_the_update_after_the_first():
    shapes = block_trees.block_shapes(1, 8)
    params, gradient = (block_trees.gaussian_like(shapes, seed) for seed in (0, 1))
    optimizer = step_time.OURS[step_time.DEFAULT]
    updates, state = step_time.update_call(optimizer, params, gradient)()
    _, expected_state = optimizer.update(gradient, optimizer.init(params), params)
    expected, expected_state = optimizer.update(gradient, expected_state, params)
    for one, other in ((updates, expected), (state, expected_state)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, other)


def test_share_is_necessary_work_by_time_and_product_rate():
    assert step_time.product_call(2, 8)().shape == (8, 8, 8)  # of all square matrices
    assert step_time.product_flops(2, 8) == 8 * (2 * 8**3)
    times = {name: [0.5, 0.25, 0.125] for name in (*step_time.OURS, *step_time.PEERS)}
    times[step_time.PRODUCT] = [1.0, 2.0, 4.0]
    work, rate, product_rate = step_time.rates(2, 8, times)
    assert work == block_trees.necessary_flops(block_trees.block_shapes(2, 8), NewtonSchulz())
    assert rate == work / 0.25
    assert product_rate == step_time.product_flops(2, 8) / 2
    assert f"share of the product rate {rate / product_rate:.2f}" in step_time.share_of_rate(
        2, 8, times
    )


def test_step_time_compares_all_with_all_peers(tmp_path, capsys):
    path = tmp_path / "results" / "step_time.json"
    with jax.numpy_dtype_promotion("standard"):  # Optax's own, in muon
        step_time.main(["--cases", "1x8", "--rounds", "3", "--json", str(path)])
    times = [line for line in read_records(path) if line["unit"] == "ms"]
    assert len(times) == len(step_time.OURS) * len(step_time.PEERS)
    assert {line["peer_name"] for line in times} == set(step_time.PEERS)
    printed = capsys.readouterr().out
    assert printed.startswith(reporting.machine())
    assert "1 layers of width 8" in printed


# Published code.

PUBLISHED = """
class Scion:
    def __init__(self, params, lr, momentum, norm, unconstrained):
        self.shapes = [param.shape for param in params]
    def step(self):
        steps.append(self.shapes)
steps = []
def iteration(G):
    return G.bfloat16()
"""


def test_published_code_runs_as_it_is_or_in_float32(tmp_path):
    path = tmp_path / "scion.py"
    path.write_text(PUBLISHED)
    tensor = SimpleNamespace(bfloat16=lambda: "bfloat16", float=lambda: "float32")
    for dtype in reference.DTYPES:
        assert reference.load(path, dtype).iteration(tensor) == dtype
    path.write_text("")
    with pytest.raises(ValueError, match="does not contain"):
        reference.load(path, "float32")


@pytest.mark.parametrize("mode", ["compiled", "eager"])
def test_published_code_gets_the_same_matrices_in_its_layout(tmp_path, monkeypatch, mode):
    def torch_compile(function):
        if mode == "eager":
            raise RuntimeError("no compiler")
        return function

    stances, module = [], SimpleNamespace()
    torch = SimpleNamespace(
        compile=torch_compile,
        compiler=SimpleNamespace(set_stance=stances.append),
        manual_seed=lambda seed: None,
        nn=SimpleNamespace(Parameter=lambda x: SimpleNamespace(shape=x.shape)),
        ones=lambda *shape, device: np.ones(shape),
        randn=lambda shape, device: np.zeros(shape),
        randn_like=lambda x: np.zeros(x.shape),
        set_num_threads=lambda count: None,
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(reference, "load", lambda path, dtype: module)
    exec(PUBLISHED, module.__dict__)
    name, step = reference.reference_call(tmp_path, block_trees.block_shapes(1, 8), 1e-3)
    step()
    assert name == f"PyTorch Scion, bfloat16, {mode}"
    assert stances == (["force_eager"] if mode == "eager" else [])
    expected = [leaf.shape[::-1] for leaf in jax.tree.leaves(block_trees.block_shapes(1, 8))]
    assert module.steps == [expected]


# Time to compile.


def test_every_compilation_starts_afresh():
    traces = []

    def update(updates, state, params=None):
        del params
        traces.append(updates)
        return updates, state

    optimizer = optax.GradientTransformation(optax.identity().init, update)
    costs = [
        compile_time.compile_afresh(optimizer, block_trees.block_shapes(1, 8)) for _ in range(2)
    ]
    assert len(traces) == 2
    assert costs[0].hlo == costs[1].hlo > 0
    assert costs[0].stablehlo == costs[1].stablehlo > 0
    assert all(cost.lower > 0 and cost.compile > 0 for cost in costs)


def test_growth_of_compilation_is_deep_by_shallow(monkeypatch):
    cost, named = compile_time.Cost, (block_trees.OURS, block_trees.PEER)
    costs = {(12, name): cost(1.0, 2.0, 3, 4.0, 5.0) for name in named}
    costs[48, block_trees.OURS] = cost(2.0, 2.0, 3, 4.0, 5.0)
    costs[48, block_trees.PEER] = cost(4.0, 8.0, 12, 16.0, 20.0)
    monkeypatch.setattr(compile_time, "OPTIMIZERS", named)
    assert compile_time.growth(costs, block_trees.OURS) == cost(2.0, 1.0, 1.0, 1.0, 1.0)
    assert compile_time.growth(costs, block_trees.PEER) == cost(4.0, 4.0, 4.0, 4.0, 4.0)
    growths = [line for line in compile_time.records(costs) if "growth" in line["benchmark"]]
    assert [line["ratio"] for line in growths] == [0.5, 0.25, 0.25, 0.25, 0.25]
    rounds = [cost(1, 5, 1, 1, 1), cost(2, 4, 1, 1, 1), cost(3, 3, 1, 1, 1)]
    assert compile_time.median_cost(rounds) == cost(2, 4, 1, 1, 1)


def test_equations_of_a_function_that_is_called_twice_count_once():
    inner = jax.jit(lambda x: jnp.sin(jnp.cos(x)))
    jaxpr = jax.make_jaxpr(lambda x: inner(inner(x)))(1.0)
    assert compile_time.count_equations(jaxpr) == 2 + 2


def test_compile_time_reports(tmp_path, capsys, monkeypatch):
    path = tmp_path / "compile_time.json"
    cache = jax.config.jax_enable_compilation_cache
    quick = {block_trees.OURS: optax.sgd(0.1), block_trees.PEER: optax.lion(0.1)}
    monkeypatch.setattr(compile_time, "OPTIMIZERS", quick)
    options = ["--width", "8", "--depths", "1", "2", "--rounds", "3"]
    compile_time.main([*options, "--json", str(path)])
    assert jax.config.jax_enable_compilation_cache == cache
    assert len(read_records(path)) == 3 * 5
    assert "| `unconstrained_scion` | 2 / 1 |" in capsys.readouterr().out


# Orthogonalization.


def test_alignment_gauge_and_gain_of_a_known_factor():
    decomposition = np.eye(2), np.array([3.0, 1.0]), np.eye(2)
    assert orthogonalization.judge(np.eye(2), decomposition) == (1, 1, 1)
    judged = orthogonalization.judge(np.diag([1.0, 0.5]), decomposition)
    assert judged == (3.5 / 4, 1, 0.5)
    judged = orthogonalization.judge(np.diag([0.5, 2.0]), decomposition)
    assert judged == (3.5 / (4 * 2), 2, 0.5)
    rank_one = np.eye(2), np.array([3.0, 0.001]), np.eye(2)
    assert orthogonalization.judge(np.diag([1.0, 0.0]), rank_one)[2] == 1  # what matters


def test_synthetic_matrices_have_the_spectra_they_are_named_for():
    cases = orthogonalization.synthetic_cases(8, 2)
    assert {stack.shape for stack in cases.values()} == {(2, 8, 8), (2, 8, 32), (2, 8, 128)}
    spectra = {name: np.linalg.svd(stack, compute_uv=False) for name, stack in cases.items()}
    expected = 10 ** (-6 * np.arange(1, 9) / 8)
    for name, sigma in spectra.items():
        if name.startswith("σ_j"):
            np.testing.assert_allclose(sigma, np.tile(expected, (2, 1)), atol=1e-6)
        rank = 1 if name.startswith("rank 1") else 4 if name.startswith("half") else 8
        if not name.startswith("σ_j"):
            assert np.all(np.sum(sigma > 1e-4 * sigma[:, :1], axis=1) == rank)


def test_methods_are_judged_as_they_are():
    matrices = orthogonalization.synthetic_cases(8, 2)["Gaussian, 8 × 32"]
    peer, every = orthogonalization.PEER, orthogonalization.methods()
    named = {name: every[name] for name in (orthogonalization.OURS, peer, orthogonalization.EXACT)}
    qualities = orthogonalization.evaluate(matrices, named, 3)
    overflowing = {"broken": NewtonSchulz([(1e30, 0.0, 0.0)] * 3)}
    small = orthogonalization.synthetic_cases(4, 1)["Gaussian, 4 × 4"]
    broken = orthogonalization.evaluate(small, overflowing, 3)["broken"]
    exact, theirs = qualities[orthogonalization.EXACT], qualities[peer]
    assert (exact.alignment, exact.gauge, exact.gain) == pytest.approx((1, 1, 1), abs=1e-5)
    assert exact.megaflops is None
    assert qualities[orthogonalization.OURS].megaflops == flops(NewtonSchulz(), 8, 32) / 1e6
    assert theirs.gauge > 1.05
    low = orthogonalization.Quality(0.8, 1.2, 0.9, 1.0, 1.0, True)
    good = orthogonalization.Quality(0.9, 1.0, 0.9, 1.0, 1.0, True)
    flagged = {"OUT": theirs, "": exact, "NAN": broken}
    assert all(orthogonalization.flags(one, theirs) == flag for flag, one in flagged.items())
    assert orthogonalization.flags(low, good) == "LOW OUT"
    assert "| – |" in orthogonalization.table(qualities)
    assert every[peer] == NewtonSchulz("quintic", 5, jnp.bfloat16)
    assert every[orthogonalization.EXACT] == ExactPolar()
    assert len(set(every.values())) == len(every)
    for dtype in ("float32", "bfloat16", "float16"):
        assert sum(name.endswith(dtype) for name in every) >= 4


def test_code_and_what_of_it_only_refuses(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('''"""What it is."""

def f(x):  # a comment
    """Doubles."""
    check_number(x)
    if x < 0:
        text = f"x is {x}"
        raise ValueError(text)
    return 2 * x
''')
    assert house.measure(path) == (6, 4)
    assert house.measure(path.rename(tmp_path / "_checks.py")) == (6, 6)


def test_imports_that_go_up_or_in_a_circle_are_told():
    below = {"norms": {"polar", "_numerics"}, "polar": {"_numerics"}, "_numerics": set()}
    assert house.faults(below) == []
    assert house.faults(below | {"_numerics": {"norms"}})[:2] == [
        "norms imports itself, by way of others",
        "polar imports itself, by way of others",
    ]
    assert "polar imports norms, which is above it" in house.faults(below | {"polar": {"norms"}})
