"""Settings that every test runs under: eight CPU devices, strict dtypes, fixed seeds."""

import os

# Dtypes and the compiler's optimization are the defaults, what users run, but where a file says
# `unoptimized`: it is about mathematics or about reading models, and compiling well tells nothing.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
