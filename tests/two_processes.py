"""One of two processes that share an explanation: python two_processes.py PORT NUMBER; run by `test_devices.py`.

Each has one device with half of the batch, then half of the weights, and prints by how much the relevance differs from
what it computes alone.
"""

import os
import sys

os.environ.pop("XLA_FLAGS", None)  # one device in each
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import relprop as rp


def fn(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def main(port: str, number: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number), initialization_timeout=40)
    print(f"of {jax.process_count()} processes: {jax.process_index()}")
    mesh = jax.make_mesh((2,), ("half",), axis_types=(AxisType.Auto,))

    def half(array, spec):
        """An array of which this process has its half, or all of it where `spec` names nothing."""
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    random = np.random.default_rng(0)
    params = {"up": random.normal(size=(4, 6)), "down": random.normal(size=(6, 3))}
    x = random.normal(size=(4, 4))
    explain = rp.explain(fn, rp.AlphaBeta(), target=1)
    alone = np.asarray(jax.jit(explain)(params, jnp.asarray(x)))
    together = jax.jit(explain, out_shardings=NamedSharding(mesh, P()))
    for name, up, down, batch in (
        ("batch", P(), P(), P("half")),
        ("weights", P(None, "half"), P("half", None), P()),
    ):
        found = together({"up": half(params["up"], up), "down": half(params["down"], down)}, half(x, batch))
        print("error", name, np.abs(np.asarray(found) - alone).max() / np.abs(alone).max())


if __name__ == "__main__":
    main(*sys.argv[1:])
