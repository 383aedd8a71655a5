"""Settings that every test runs under: eight CPU devices, strict dtypes, fixed seeds."""

import os
import shutil
import tempfile
from importlib.metadata import version

# Dtypes and the compiler's optimization are the defaults, what users run, but where a file says
# `unoptimized`: it is about mathematics or about reading models, and compiling well tells nothing.
# Splitting programs, to compile their parts at a time, costs a tenth where cores run tests anyway.
flags = ["--xla_force_host_platform_device_count=8", "--xla_cpu_parallel_codegen_split_count=1"]
# JAX before 0.11 can make kernels in two ways, of which the older one compiles in half the time, and
# optimizes as well. Later ones have the other way only, which CI runs the tests marked `fast` with.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    flags.append("--xla_cpu_use_fusion_emitters=false")
# What the environment says comes last, so it prevails.
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
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


@pytest.fixture(autouse=True, scope="module")
def compiler(request):
    """Optimizes, unless the file is marked `unoptimized`."""
    if request.node.get_closest_marker("unoptimized") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    """Lets a test use float64."""
    with jax.enable_x64(True):
        yield
