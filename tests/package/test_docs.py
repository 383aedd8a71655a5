"""The README's code and the documentation's runs, and the reference lists every public name."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import scion_jax
from scion_jax import clipped_scion, describe

pytestmark = pytest.mark.unoptimized

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
PATHS = {path.relative_to(PAGES).as_posix(): path for path in sorted(PAGES.rglob("*.md"))}
# A block of code, below the package it needs where the tests have not got that, and what it
# prints if a block of text follows at once.
BLOCK = re.compile(
    r"^(?:<!-- needs (\w+) -->\n\n?)?```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)

NOT_STRICT = {"migrating/muon.md"}  # Optax's Muon itself raises a float to an integer array


def blocks(path, package=None):
    """Returns code, below as many empty lines as stand above it in the page, and its output."""
    text = path.read_text()
    found = [m for m in BLOCK.finditer(text) if m[1] == package]
    return [("\n" * text.count("\n", 0, m.start(2)) + m[2], m[3]) for m in found]


def needed(path):
    """Returns the packages that single blocks of a page need."""
    return sorted({m[1] for m in BLOCK.finditer(path.read_text()) if m[1]})


def without_places(text):
    """Cuts off the last column of `describe`: lines of Flax's files, other ones in each version."""
    lines, width = [], None
    for line in text.rstrip().splitlines():
        header = re.match(r"path .*?(?=  read at$)", line)
        width = len(header[0]) if header else width
        table = header or set(line) == {"─"} or re.search(r" \w+\.py:\d+( |,|$)", line)
        lines.append(line[:width].rstrip() if table else line.rstrip())
    return lines


@pytest.mark.fast
def test_readme():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 32, rngs=rngs)
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.hidden = nnx.Linear(32, 32, rngs=rngs)
            self.head = nnx.Linear(32, 16, rngs=rngs, use_bias=False)

        def __call__(self, tokens):
            return self.head(jax.nn.relu(self.hidden(self.norm(self.embed(tokens)))))

    @jax.jit  # an operation at a time takes longer
    def loss_of(model, tokens):
        logits, following = model(tokens), (3 * tokens + 1) % 16
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    names = {name: getattr(scion_jax, name) for name in dir(scion_jax) if name[0] != "_"}
    names |= {"Network": Network, "loss_of": loss_of, "batches": [jnp.arange(16)] * 25}
    names |= {"jax": jax, "nnx": nnx}
    ((example, _),) = blocks(ROOT / "README.md")
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    exec(example, names)
    assert float(names["loss"]) < 0.1  # from log 16 = 2.77


@pytest.mark.parametrize("page", [page for page, path in PATHS.items() if blocks(path)])
def test_every_block_runs(page, capsys):
    namespace = {"__name__": "__main__"}
    promotion = "standard" if page in NOT_STRICT else "strict"
    for code, output in blocks(PATHS[page]):
        with jax.numpy_dtype_promotion(promotion):
            exec(compile(code, str(PATHS[page]), "exec"), namespace)
        printed = capsys.readouterr().out
        if output is not None:
            assert without_places(printed) == without_places(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "package"), [(page, name) for page, path in PATHS.items() for name in needed(path)]
)
def test_blocks_that_need_a_package(page, package):
    """In a process of their own, with one device and JAX's defaults, as a user has it."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, which these blocks of {page} need")
    found = blocks(PATHS[page], package)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(code for code, _ in found)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    expected = [line for _, output in found if output for line in without_places(output)]
    printed = without_places(run.stdout)
    assert printed[len(printed) - len(expected) :] == expected  # some packages greet first


def test_every_block_says_what_it_is():
    """A block without a language, or in another spelling, would not run."""
    for page, path in PATHS.items():
        opened = re.findall(r"^\s*```(.*)\n(?:.*\n)*?\s*```$", path.read_text(), re.MULTILINE)
        assert set(opened) <= {"python", "text", "sh"}, page


def test_every_public_name_is_in_the_reference():
    tree = ast.parse(inspect.getsource(scion_jax))
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    public = [alias.asname for node in imported for alias in node.names]
    text = "\n".join(path.read_text() for page, path in PATHS.items() if page.startswith("api/"))
    assert sorted(re.findall(r"^::: scion_jax\.(\w+)$", text, re.MULTILINE)) == sorted(public)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\S+\.md)$", (PAGES.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PATHS)


def test_own_norm():
    """The one that the documentation gives as an example is a norm like any other."""
    namespace = {"jnp": jnp}
    (code,) = [code for code, _ in blocks(PATHS["choosing.md"]) if "class EntrySum" in code]
    exec(code, namespace)
    norm = namespace["EntrySum"](3.0, layout="bio")
    d = jax.random.normal(jax.random.key(0), (2, 3, 4))
    v = norm.lmo(d)
    assert float(norm.gauge(v)) == pytest.approx(1)
    assert float(jnp.vdot(d, v)) == pytest.approx(float(norm.dual_norm(d)))
    assert not bool(jnp.any(norm.lmo(jnp.zeros((2, 3, 4)))))
    params = norm.init(jax.random.key(0), (2, 3, 4))
    optimizer = clipped_scion(0.1, norm, rho=1.0, short_step=True)
    updates, _ = optimizer.update(d, optimizer.init(params), params)
    assert updates.shape == d.shape
    assert str(describe(params, norm)).endswith("–")  # it does not say how long its steps are
