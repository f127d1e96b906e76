"""What does a network think that a 3 looks like? Prototypes of ten digits, found by activation maximisation in three ways.

    pip install "relprop[examples]"
    python examples/prototypes.py --mnist FOLDER

reproduces the comparison of Montavon, Samek and Müller 2018 ("Methods for interpreting and understanding deep neural
networks", section 3) on MNIST, or on scikit-learn's digits without a folder with mnist_train.npz and mnist_test.npz:

    simple  max log p(class | x) - strength ||x - mean||^2
    expert  max log p(class | x) + strength log p(x), with a Gaussian RBM that is trained on the digits
    code    max log p(class | g(z)) - strength ||z||^2, with the decoder g of a variational autoencoder

It trains two networks (one is explained, the other one judges), the expert and the autoencoder, keeps them with --models,
prints for each prototype the probability of its class under both networks, log p(x) and the distance to the nearest
digit of the training data, and draws one picture of three rows.
"""

import argparse
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digit_models import Classifier, Decoder, load, remembered, train_classifier, train_vae
from matplotlib.figure import Figure

import relprop as rp
from relprop.maximization import L2, Code, Pixel

LATENTS = {28: 16, 8: 8}  # dimensions of the code, by the size of the images
NOISE = 0.15  # standard deviation of what is added to digits for the expert
STRENGTHS = {"simple": 0.004, "expert": 0.002, "code": 0.01}


def prototypes(classify, decode, expert, mean, latents, key, steps):
    """The digits that the network finds most typical of each class, in three ways: a `Maximum` for each."""

    def log_probability(x, digit):
        return jax.nn.log_softmax(classify(x[None])[0])[digit]

    def scaled_expert(x):
        return STRENGTHS["expert"] * expert(x)

    def box(x):
        return optax.projections.projection_box(x, 0.0, 1.0)

    ways = {
        "simple": {"parametrisation": Pixel(mean), "log_prior": L2(STRENGTHS["simple"], mean), "projection": box},
        "expert": {"parametrisation": Pixel(mean), "log_prior": scaled_expert, "projection": box},
        "code": {"parametrisation": Code(decode, latents, noise=0.5, prior=L2(STRENGTHS["code"])), "restarts": 4},
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    return {
        name: rp.maximize(log_probability, optimizer=optimizer, steps=steps, key=key, each=jnp.arange(10), **way)
        for name, way in ways.items()
    }


def rate(expert, images, test_images, key, temperatures):
    """Print how likely unseen digits are under the expert and under a Gaussian; return its log-partition function.

    Both are of digits with noise, as the expert was trained on: without it pixels that never change have no density.
    """
    noisy = jnp.asarray(test_images[:2000]) + NOISE * jax.random.normal(key, test_images[:2000].shape)
    constant, error = expert.log_partition(key, chains=200, temperatures=temperatures)
    likelihood = (expert(noisy) - constant).mean()
    gaussian = rp.maximization.Gaussian.fit(images, NOISE)(noisy).mean()
    print(
        f"log-likelihood of test digits: expert {likelihood:.1f} (standard error {error:.2f}), Gaussian {gaussian:.1f} nats"
    )
    return constant, likelihood, gaussian


def nearest(x, images):
    """The distance of each x to the nearest image, in the units of a pixel."""
    flat = images.reshape(len(images), -1)
    return np.array([np.sqrt(((flat - one.reshape(1, -1)) ** 2).sum(1).min()) for one in np.asarray(x)])


def judge(found, networks, log_density, images):
    """For each way a table with a row for each digit: both probabilities, log p(x), the distance to the nearest digit."""
    tables = {}
    for name, each in found.items():
        probabilities = [np.asarray(nn.softmax(classify(each.input)))[range(10), range(10)] for classify in networks]
        right = np.asarray(networks[1](each.input)).argmax(-1) == np.arange(10)
        tables[name] = {
            "p(class)": probabilities[0],
            "p by second": probabilities[1],
            "right by second": right,
            "log p(x)": np.asarray(log_density(each.input)),
            "distance": nearest(each.input, images),
        }
    return tables


def show(tables):
    """Print the tables."""
    columns = [column for column in next(iter(tables.values())) if column != "right by second"]
    for name, table in tables.items():
        print(f"\n{name:>8}", *(f"{column:>12}" for column in columns))
        for digit in range(10):
            print(f"{digit:>8}", *(f"{table[column][digit]:12.4f}" for column in columns))
    print(f"\n{'mean':>8}", *(f"{column:>12}" for column in columns), "  right by second, of 10")
    for name, table in tables.items():
        print(f"{name:>8}", *(f"{table[column].mean():12.4f}" for column in columns), f"{table['right by second'].sum():8}")


def draw(found, tables):
    """One picture: a row for each way, a column for each digit."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    rows = figure.subplots(len(found), 10)
    for row, (name, each) in zip(rows, found.items(), strict=True):
        for digit, (ax, image) in enumerate(zip(row, each.input, strict=True)):
            ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_title(f"{tables[name]['p by second'][digit]:.2f}", fontsize="small")
        row[0].set_ylabel(name)
    figure.suptitle("prototypes of ten digits, and their probability by a second network", fontsize="medium")
    return figure


def draw_samples(expert, key):
    """One picture of what the expert dreams of: Gibbs sampling from random hidden units, 1000 steps."""
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    for ax, image in zip(figure.subplots(2, 10).ravel(), expert.sample(key, 20), strict=True):
        ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
        ax.set_axis_off()
    return figure


def train(images, labels, models, short):
    """Two classifiers, an expert, a decoder: functions of images, and of codes; and the number of dimensions of a code."""
    size, shape = images.shape[1], images.shape[1:]
    latents = LATENTS[size]

    def timed(name, make, form):
        begun = time.perf_counter()
        made = remembered(models and models / f"{name}.npz", make, form)
        print(f"{name:>12}: {time.perf_counter() - begun:5.1f} s", flush=True)
        return made

    key = jax.random.key(2)
    form = jax.eval_shape(lambda: Classifier().init(key, images[:1]))
    classifiers = [
        timed(f"network {seed}", lambda seed=seed: train_classifier(images, labels, seed, short), form) for seed in (0, 1)
    ]
    options = {"steps": 300} if short else {}
    form = jax.eval_shape(lambda: rp.maximization.fit_rbm(jnp.asarray(images[:2]), key=key, steps=1))
    expert = timed("expert", lambda: rp.maximization.fit_rbm(images, key=key, noise=NOISE, **options), form)
    form = jax.eval_shape(lambda: Decoder(shape).init(key, jnp.zeros((1, latents))))
    decoder = timed("autoencoder", lambda: train_vae(images, 3, latents, short)[1], form)
    networks = [jax.jit(lambda x, params=params: Classifier().apply(params, x)) for params in classifiers]
    return networks, expert, lambda z: Decoder(shape).apply(decoder, z[None])[0], latents


def main(arguments=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--mnist", type=Path, help="a folder with mnist_train.npz and mnist_test.npz: x (N, 28, 28), y (N,)")
    parser.add_argument("--models", type=Path, help="a folder that keeps what was trained, to be loaded the next time")
    parser.add_argument("--out", type=Path, default=Path("prototypes.png"), help="the picture to write")
    parser.add_argument("--samples", type=Path, help="a second picture to write: samples of the expert")
    parser.add_argument("--short", action="store_true", help="train for a moment only")
    arguments = parser.parse_args(arguments)

    (images, labels), (test_images, test_labels) = load(arguments.mnist)
    networks, expert, decode, latents = train(images, labels, arguments.models, arguments.short)
    for i, classify in enumerate(networks):
        right = [np.argmax(classify(x), -1) == y for x, y in zip(*map(batches, (test_images, test_labels)), strict=True)]
        print(f"network {i}: test accuracy {np.concatenate(right).mean():.2%}")

    key = jax.random.key(4)
    constant, *likelihoods = rate(expert, images, test_images, key, 100 if arguments.short else 1000)

    begun = time.perf_counter()
    steps = 50 if arguments.short else 400
    mean = jnp.asarray(images.mean(0))
    found = prototypes(networks[0], decode, expert, mean, latents, key, steps)
    print(f"prototypes: {time.perf_counter() - begun:.1f} s")
    tables = judge(found, networks, lambda x: expert(x) - constant, images)
    show(tables)
    draw(found, tables).savefig(arguments.out, dpi=120)
    print(f"\nprototypes: {arguments.out.resolve()}")
    if arguments.samples is not None:
        draw_samples(expert, key).savefig(arguments.samples, dpi=120)
        print(f"samples of the expert: {arguments.samples.resolve()}")
    return tables, likelihoods


def batches(array, size=1000):
    return np.array_split(array, -(-len(array) // size))


if __name__ == "__main__":
    main()
