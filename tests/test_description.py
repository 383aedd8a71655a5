"""`describe`: a table of how every leaf is read, in which equal blocks are folded."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scion_jax import (
    Auto,
    BiasRMS,
    ColNorm,
    Euclidean,
    RowNorm,
    Sign,
    Spectral,
    SpectralConv,
    describe,
    unconstrained_scion,
)

pytestmark = pytest.mark.unoptimized

LEAVES = {
    "conv": ((3, 3, 8, 16), SpectralConv(8.0)),
    "embed": ((100, 16), ColNorm(2.0)),
    "head": ((16, 10), Sign(160.0)),
    "qkv": ((16, 32), Spectral(3.0, layout="io[16,8,8]")),
    "layers": ((5, 16, 64), Spectral(2.0, layout="bio")),
    "one": ((7, 1), ColNorm(5.0)),
    "row": ((1, 10), RowNorm(2.0)),
    "rows": ((6, 10), RowNorm(3.0)),
    "scale": ((5, 16), BiasRMS(layout="bo")),
    "slope": ((), BiasRMS(2.0)),
    "whole": ((6, 10), Euclidean(4.0)),
}


def gaussian(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_rows_say_how_leaves_are_read():
    params = {name: gaussian(*shape) for name, (shape, _) in sorted(LEAVES.items())}
    norms, labels = {n: norm for n, (_, norm) in LEAVES.items()}, {n: n for n in LEAVES}
    table = describe(params, norms, labels)
    rows = {row.path: row for row in table.rows}
    assert rows["conv"][1:7] == ((3, 3, 8, 16), "conv", "SpectralConv", "ssio", "9·8 → 16", 8.0)
    assert rows["qkv"].matrices == "16 → 16, 2 × (16 → 8)"
    assert rows["layers"].matrices == "5 × (16 → 64)"
    assert rows["scale"].matrices == "5 × (16)"
    optimizer = unconstrained_scion(1.0, norms, labels)
    steps, _ = jax.jit(optimizer.update)(params, optimizer.init(params))
    for name, step in steps.items():  # orthogonalized to within 3 %
        rms = float(jnp.sqrt(jnp.mean(step**2)))
        np.testing.assert_allclose(rows[name].step_rms, rms, rtol=4e-2)
    lines = str(table).splitlines()
    assert len(lines) == 2 + len(params)
    assert lines[0].split("  ")[0] == "path"
    assert all(word in lines[0] for word in ("label", "layout", "radius", "d_in → d_out"))
    assert repr(table) == str(table)
    assert describe(jax.eval_shape(lambda: params), norms, labels) == table
    assert describe({"b": jnp.ones(3)}).rows[0].label is None
    assert all(row.read_at == "" for row in table.rows)
    assert "read at" not in lines[0]
    assert describe({"w": jnp.ones((1, 1))}).rows[0].step_rms == 1


def paths_in(table):
    return [re.split(r"\s{2,}", line)[0] for line in str(table).splitlines()[2:]]


def test_equal_blocks_are_folded():
    def block(width=8):
        return {"w": gaussian(8, width), "layers": [{"v": gaussian(8, 8)} for _ in range(3)]}

    params = {"blocks": [block() for _ in range(12)], "h_1": gaussian(2, 3), "z": gaussian(2)}
    table = describe(params)
    assert paths_in(table) == ["blocks/0…11/layers/0…2/v", "blocks/0…11/w", "h_1", "z"]
    assert len(table.rows) == 12 * 4 + 2
    whole = describe(params, fold=False)
    assert whole.rows == table.rows
    assert paths_in(whole) == [row.path for row in table.rows]
    params["blocks"][4] = block(16)  # unlike the others
    params["blocks"][7]["layers"].pop()  # another set
    assert paths_in(describe(params)) == [
        *("blocks/0…6,8…11/layers/0…2/v", "blocks/0…3,5…11/w", "blocks/4/w"),
        *("blocks/7/layers/0…1/v", "h_1", "z"),
    ]
    w = gaussian(4, 4)
    linen = {f"Block_{i}": {"Dense_0": w, "Dense_1": w} for i in (0, 2)}
    assert paths_in(describe(linen)) == ["Block_0,2/Dense_0…1"]
    assert paths_in(describe({"0": w, "x": {"0": w}})) == ["0", "x/0"]
    assert paths_in(describe({})) == []


def test_convolutions_are_read_by_their_rank_and_need_a_window():
    row = describe({"w": gaussian(2, 3, 4, 5)}, SpectralConv()).rows[0]
    assert (row.layout, row.matrices) == ("ssio", "6·4 → 5")
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(2, 3\) has no window axis 's'"):
        describe({"w": gaussian(2, 3)}, SpectralConv())


@pytest.mark.parametrize("kind", [Auto, Sign, ColNorm, RowNorm, BiasRMS, Euclidean])
def test_empty_arrays_can_be_described(kind):
    for shape in [(0, 0), (0, 3), (3, 0), (0,)]:
        norm = kind(layout="io"[-len(shape) :])
        assert describe({"w": gaussian(*shape)}, norm).rows[0].shape == shape
