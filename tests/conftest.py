"""Settings that every test runs under: eight CPU devices, strict dtypes, fixed seeds."""

import os
import shutil
import tempfile
from importlib.metadata import version

# Dtypes and the compiler's optimization are the defaults, what users run, but where a file or a
# test says `unoptimized`: it is about mathematics, about reading models, or about one program
# beside another, and compiling well tells nothing.
os.environ["XLA_FLAGS"] = " ".join(
    [
        # The older of two ways to make kernels takes half the time to compile, and optimizes as
        # well. JAX 0.12 has the other way only, in which CI runs the tests marked `fast`; all of
        # them, .ci/nightly.
        "--xla_cpu_use_fusion_emitters=false"
        if version("jaxlib").startswith(("0.8.", "0.9.", "0.10."))
        else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # To compile parts of a program at a time costs a tenth where all cores run tests anyway.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Whatever is compiled is kept; see `pytest_configure`. Said here, so that processes that tests
# start keep it, too.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile(
    "deterministic",
    derandomize=True,
    deadline=None,
    max_examples=10,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings.get_profile("deterministic"), max_examples=100
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))


def pytest_configure(config):
    """Lets all processes of this run share what they compile.

    Many tests make the same optimizer of the same tree; this saves them a third of the time.
    """
    folder = "JAX_COMPILATION_CACHE_DIR"
    if folder not in os.environ:
        os.environ[folder] = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ[folder], ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ[folder])


def compiler(request):
    """Optimizes, unless the file or the test is marked `unoptimized`."""
    before = jax.config.read("jax_disable_most_optimizations")
    marked = request.node.get_closest_marker("unoptimized") is not None
    jax.config.update("jax_disable_most_optimizations", marked)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


compiler_of_file = pytest.fixture(autouse=True, scope="module")(compiler)
compiler_of_test = pytest.fixture(autouse=True)(compiler)


@pytest.fixture
def x64():
    """Lets a test use float64."""
    with jax.enable_x64(True):
        yield
