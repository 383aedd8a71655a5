"""The documentation's code runs, page by page, and its reference lists every public name."""

import ast
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import scion_jax
from scion_jax import clipped_scion, describe

pytestmark = pytest.mark.unoptimized

PAGES = Path(__file__).parents[1] / "docs" / "pages"
PATHS = {path.relative_to(PAGES).as_posix(): path for path in sorted(PAGES.rglob("*.md"))}
# A block of code, and what it prints if a block of text follows at once.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)

NOT_STRICT = {"migrating/muon.md"}  # Optax's Muon itself raises a float to an integer array


def blocks(path):
    """Returns code, below as many empty lines as stand above it in the page, and its output."""
    text = path.read_text()
    return [("\n" * text.count("\n", 0, m.start(1)) + m[1], m[2]) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page, path in PATHS.items() if blocks(path)])
def test_every_block_runs(page, capsys):
    namespace = {"__name__": "__main__"}
    promotion = "standard" if page in NOT_STRICT else "strict"
    for code, output in blocks(PATHS[page]):
        with jax.numpy_dtype_promotion(promotion):
            exec(compile(code, str(PATHS[page]), "exec"), namespace)
        printed = capsys.readouterr().out
        if output is not None:
            assert printed.rstrip() == output.rstrip()


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
