"""Small networks of digits for prototypes.py: a classifier, and a variational autoencoder whose decoder draws digits."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

STEPS = {"classifier": {28: 700, 8: 400}, "autoencoder": {28: 6000, 8: 2000}}  # by the size of the images
BATCH = 128


def load(folder: Path | None):
    """(images, labels) to train on, (images, labels) to test on; images (N, height, width, 1) in 0..1.

    MNIST from a folder with mnist_train.npz and mnist_test.npz, each with x (N, 28, 28) in 0..255 and y (N,); without a
    folder scikit-learn's digits, 8 x 8.
    """
    if folder is not None:
        parts = [np.load(folder / f"mnist_{name}.npz") for name in ("train", "test")]
        return tuple(((part["x"][..., None] / 255).astype(np.float32), part["y"].astype(np.int32)) for part in parts)
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    train, test, labels, test_labels = train_test_split(
        images, digits.target.astype(np.int32), test_size=0.25, random_state=0, stratify=digits.target
    )
    return (train, labels), (test, test_labels)


class Classifier(nn.Module):
    """Images (N, height, width, 1) -> logits (N, 10)."""

    @nn.compact
    def __call__(self, x):
        if x.shape[1] > 14:
            x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


class Encoder(nn.Module):
    """Images (N, height, width, 1) -> mean and log-variance of codes, (N, latents) each."""

    latents: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(400)(x.reshape(len(x), -1)))
        return nn.Dense(self.latents)(x), nn.Dense(self.latents)(x)


class Decoder(nn.Module):
    """Codes (N, latents) -> logits of pixels, or with `images` the pixels, (N, *shape)."""

    shape: tuple[int, ...]
    images: bool = True

    @nn.compact
    def __call__(self, z):
        z = nn.relu(nn.Dense(200)(z))
        z = nn.relu(nn.Dense(400)(z))
        logits = nn.Dense(int(np.prod(self.shape)))(z).reshape(-1, *self.shape)
        return nn.sigmoid(logits) if self.images else logits


def fit(loss, params, images, labels, steps, key, rate=2e-3):
    """Parameters after `steps` of Adam on `loss(params, images, labels, key)`."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    # A compiled step for each batch: XLA's convolutions are several times slower inside of a compiled loop on the CPU.
    @jax.jit
    def step(params, memory, x, y, key):
        updates, memory = optimizer.update(jax.grad(loss)(params, x, y, key), memory)
        return optax.apply_updates(params, updates), memory

    memory = optimizer.init(params)
    rng = np.random.default_rng(0)
    for i in range(steps):
        chosen = rng.integers(len(images), size=BATCH)
        params, memory = step(params, memory, images[chosen], labels[chosen], jax.random.fold_in(key, i))
    return params


def train_classifier(images, labels, seed, short=False):
    """Parameters of a `Classifier`. Images are shifted by a pixel and made noisy, so that it looks at shapes."""
    first, later = jax.random.split(jax.random.key(seed))

    def loss(params, x, y, key):
        shift, noise = jax.random.split(key)
        x = jnp.roll(x, jax.random.randint(shift, (2,), -1, 2), (1, 2)) + 0.1 * jax.random.normal(noise, x.shape)
        return optax.softmax_cross_entropy_with_integer_labels(Classifier().apply(params, x), y).mean()

    steps = 100 if short else STEPS["classifier"][images.shape[1]]
    return fit(loss, Classifier().init(first, images[:1]), images, labels, steps, later)


def train_vae(images, seed, latents, short=False):
    """Parameters of an `Encoder` and a `Decoder`: a variational autoencoder (Kingma, Welling 2014).

    Pixels are probabilities, codes have a standard normal prior.
    """
    encoder, decoder = Encoder(latents), Decoder(images.shape[1:], images=False)
    first, second, later = jax.random.split(jax.random.key(seed), 3)
    params = encoder.init(first, images[:1]), decoder.init(second, jnp.zeros((1, latents)))

    def loss(params, x, _, key):
        mean, log_variance = encoder.apply(params[0], x)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        pixels = optax.sigmoid_binary_cross_entropy(decoder.apply(params[1], z), x).sum((1, 2, 3))
        divergence = (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(1) / 2
        return (pixels + divergence).mean()

    steps = 200 if short else STEPS["autoencoder"][images.shape[1]]
    return fit(loss, params, images, np.zeros(len(images)), steps, later)


def remembered(path: Path | None, make, form):
    """What `make()` returns, a pytree of arrays: from the file at `path` if it is there; else made, and saved there.

    `form` is a pytree of that form, of anything with shapes.
    """
    if path is not None and path.exists():
        with np.load(path) as arrays:
            found = [arrays[str(i)] for i in range(len(arrays.files))]
        if [array.shape for array in found] != [leaf.shape for leaf in jax.tree.leaves(form)]:
            raise ValueError(f"{path} holds another model than the one that is asked for: remove it to train anew.")
        return jax.tree.unflatten(jax.tree.structure(form), found)
    made = jax.block_until_ready(make())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{str(i): leaf for i, leaf in enumerate(jax.tree.leaves(made))})
    return made
