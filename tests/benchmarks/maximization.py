"""Ten classes at once beside one: `python -m tests.benchmarks.maximization`.

The time of a run of `relprop.maximize` for ten items by that of a run for one, compiled, on whatever device JAX has. On an
accelerator ten inputs are a small batch, and the ratio should be close to 1; a CPU has no width to spare.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax

import relprop as rp


def dense(x, widths=(2048, 2048, 10)):
    """The logits of a dense network for one image (28, 28, 1)."""
    x = x.reshape(1, -1)
    for i, width in enumerate(widths):
        x = jnp.tanh(x) @ (jax.random.normal(jax.random.key(i), (x.shape[1], width)) / x.shape[1] ** 0.5)
    return x[0]


def convolutional(x, widths=(16, 32, 64)):
    """The logits of a convolutional network for one image (28, 28, 1)."""
    x = x[None]
    for i, width in enumerate(widths):
        kernel = jax.random.normal(jax.random.key(i), (3, 3, x.shape[-1], width)) / (9 * x.shape[-1]) ** 0.5
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return x.reshape(-1) @ jax.random.normal(jax.random.key(9), (x.size, 10))


def seconds(network, items, steps, repeats):
    """The shortest time of a compiled run."""

    @jax.jit
    def run(items):
        def objective(x, item):
            return jax.nn.log_softmax(network(x))[item]

        return rp.maximize(objective, jnp.zeros((28, 28, 1)), optax.adam(0.05), steps, each=items).value

    jax.block_until_ready(run(items))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(run(items))
        times.append(time.perf_counter() - begun)
    return min(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {arguments.steps} steps")
    print(f"{'network':>14} {'one, ms':>9} {'ten, ms':>9} {'ratio':>6}")
    for network in (dense, convolutional):
        one, ten = (1e3 * seconds(network, jnp.arange(n), arguments.steps, arguments.repeats) for n in (1, 10))
        print(f"{network.__name__:>14} {one:9.1f} {ten:9.1f} {ten / one:6.2f}")


if __name__ == "__main__":
    main()
