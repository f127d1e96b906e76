"""Ten classes at once beside one: `python -m tests.benchmarks.maximization`.

The time of a run of `relprop.maximize` for ten items by that of a run for one, compiled, on whatever device JAX has. Where
one input leaves the device waiting for the weights to be read, nine more are nearly free: the ratio should be close to 1, at
most 1.5. On a CPU this holds for matrices that do not fit into its caches. Where one input keeps a CPU busy, as convolutions
do, ten take nearly ten times as long; an accelerator is not busy with ten images of this size.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import optax

import relprop as rp


def dense(*widths):
    """A network of matrices: a function from one image (28, 28, 1) to ten logits."""
    widths = 28 * 28, *widths, 10
    weights = [random(i, n, m) / n**0.5 for i, (n, m) in enumerate(itertools.pairwise(widths))]

    def network(x):
        x = x.reshape(1, -1)
        for matrix in weights:
            x = jnp.tanh(x) @ matrix
        return x[0]

    return network


def convolutional(*widths):
    """A network of convolutions that halve the image: a function from one image (28, 28, 1) to ten logits."""
    kernels = [random(i, 3, 3, n, m) / (9 * n) ** 0.5 for i, (n, m) in enumerate(itertools.pairwise((1, *widths)))]
    last = random(99, 4 * 4 * widths[-1], 10)

    def network(x):
        x = x[None]
        for kernel in kernels:
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout))
        return x.reshape(-1) @ last

    return network


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


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
    print(f"{'network':>24} {'one, ms':>9} {'ten, ms':>9} {'ratio':>6}")
    networks = {
        "2 x 512, dense": dense(512, 512),
        "2 x 2048, dense": dense(2048, 2048),
        "2 x 4096, dense": dense(4096, 4096),
        "16, 32, 64, convolutions": convolutional(16, 32, 64),
    }
    for name, network in networks.items():
        one, ten = (1e3 * seconds(network, jnp.arange(n), arguments.steps, arguments.repeats) for n in (1, 10))
        print(f"{name:>24} {one:9.1f} {ten:9.1f} {ten / one:6.2f}", flush=True)


if __name__ == "__main__":
    main()
