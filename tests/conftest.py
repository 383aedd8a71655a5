"""Settings that every test runs under: eight CPU devices, strict dtypes, fixed seeds."""

import os

# Dtypes and the compiler's optimization are the defaults: what users run.
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
    max_examples=20,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture
def x64():
    """Lets a test use float64."""
    with jax.enable_x64(True):
        yield
