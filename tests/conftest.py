"""How every test runs: in float64, on eight CPU devices, with JAX's strict promotion rules and no display."""

import os

# Read once, when JAX's backend starts and when pyplot is first imported: so before anything imports either.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
# What passes under these passes under the defaults; the other way round it does not hold.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def default_promotion():
    """JAX's default promotion, for code of other packages: flax's avg_pool and optax's adam need it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
