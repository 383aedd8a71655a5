"""Lets pages show the pictures of benchmarks/results, which experiments draw."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them as pictures/results/NAME.png."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"pictures/results/{path.name}", abs_src_path=path))
    return files
