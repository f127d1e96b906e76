"""Train a small convolutional network on handwritten digits and explain it, in half a minute.

    pip install "relprop[examples]"
    python examples/quickstart.py

prints how good the network is, which rule holds where, and how much relevance the pixels get, and draws it.
"""

import argparse
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import relprop as rp
from relprop.plot import heatmap

PRESETS = {
    "epsilon_plus": rp.presets.epsilon_plus(),
    "epsilon_plus_flat": rp.presets.epsilon_plus_flat(),
    "epsilon_alpha2_beta1": rp.presets.epsilon_alpha2_beta1(),
    # These two use that a pixel lies between 0 and 1.
    "epsilon_gamma_box": rp.presets.epsilon_gamma_box(low=0.0, high=1.0),
    "deep_taylor": rp.presets.deep_taylor(low=0.0, high=1.0),
}


class CNN(nn.Module):
    """Images (N, 8, 8, 1) -> logits (N, 10)."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(x)


def load():
    """(images, labels) to train on, (images, labels) to test on; images (N, 8, 8, 1) in 0..1."""
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    train, test, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return (train, train_labels), (test, test_labels)


def train(model, images, labels, steps, batch=64):
    """Parameters after `steps` of Adam."""
    params = model.init(jax.random.key(0), images[:1])
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.integers(len(images), size=batch)
        params, state = step(params, state, images[chosen], labels[chosen])
    return params


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"), help="the picture to write")
    parser.add_argument("--short", action="store_true", help="train for a moment only")
    arguments = parser.parse_args()

    started = time.perf_counter()
    model = CNN()
    (images, labels), (test_images, test_labels) = load()
    params = train(model, images, labels, steps=100 if arguments.short else 600)
    predicted = jnp.argmax(jax.jit(model.apply)(params, test_images), axis=-1)
    accuracy = np.mean(predicted == test_labels)
    print(f"trained in {time.perf_counter() - started:.1f} s, test accuracy {accuracy:.1%}")

    # The first test image of each digit, and the evidence for what it is.
    x = jnp.stack([test_images[np.argmax(test_labels == digit)] for digit in range(10)])
    target = jnp.arange(10)
    logits = model.apply(params, x)[target, target]

    print("\nwhich rule holds where, for example under epsilon_gamma_box:")
    print(rp.plan(model.apply, PRESETS["epsilon_gamma_box"])(params, x))

    print("\nthe logits of a 0, a 1, ... a 9, and the sums of the relevance of their pixels")
    print(f"{'logit':>22}", *(f"{logit:6.2f}" for logit in logits))
    relevance = {}
    for name, rules in PRESETS.items():
        relevance[name] = jax.jit(rp.explain(model.apply, rules, target=target))(params, x)
        print(f"{name:>22}", *(f"{total:6.2f}" for total in relevance[name].sum(axis=(1, 2, 3))))
    print("They differ by what biases absorb; epsilon_alpha2_beta1 also doubles what nothing contradicts.")

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    rows = figure.subplots(1 + len(relevance), len(x))
    for ax, image in zip(rows[0], x, strict=True):
        ax.imshow(image[..., 0], cmap="gray")
        ax.set_axis_off()
    for row, (name, each) in zip(rows[1:], relevance.items(), strict=True):
        heatmap(each, ax=row)
        row[0].set_title(name, loc="left", fontsize="small")
    figure.savefig(arguments.out, dpi=120)
    print(f"\nheatmaps (red speaks for the digit, blue against it): {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
