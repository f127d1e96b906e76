"""What makes a photograph of a parrot a parrot: relevance for MobileNetV2 or SqueezeNet, pixel by pixel.

    pip install "relprop[examples]"
    python examples/photograph.py --model mobilenet_v2 --weights FOLDER --photo parrot.jpg

FOLDER holds the trained weights, mobilenet_v2_1.0_224_quant_float.npz for mobilenet_v2 or weights.npz for
squeezenet (imagenet_models.py says in which layout), and if there is one the list of class names,
imagenet_labels.txt or synset_words.txt.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import imagenet_models as models
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import relprop as rp
from relprop.plot import heatmap


class Model(NamedTuple):
    """What differs from one network to the other."""

    logits: Callable  # of params and preprocessed images
    preprocess: Callable
    load: Callable  # of the folder
    size: int  # of the square image, in pixels
    names: str  # the file of class names in the folder


MODELS = {
    "mobilenet_v2": Model(
        models.mobilenet_v2, models.preprocess_mobilenet, models.load_mobilenet_v2, 224, "imagenet_labels.txt"
    ),
    "squeezenet": Model(models.squeezenet, models.preprocess_squeezenet, models.load_squeezenet, 227, "synset_words.txt"),
}

# The explained input is the raw pixel, so that the box of the first layer's rule is 0 to 255.
PRESETS = {
    "epsilon_plus": rp.presets.epsilon_plus(),
    "epsilon_plus_flat": rp.presets.epsilon_plus_flat(),
    "epsilon_alpha2_beta1": rp.presets.epsilon_alpha2_beta1(),
    "epsilon_gamma_box": rp.presets.epsilon_gamma_box(low=0.0, high=255.0),
    "deep_taylor": rp.presets.deep_taylor(low=0.0, high=255.0),
}


def class_names(path, count):
    """The first name of each class; numbers where there is no file."""
    if not path.is_file():
        return [f"class {i}" for i in range(count)]
    # "n01440764 tench, Tinca tinca" or "tench, Tinca tinca"
    return [re.match(r"(?:n\d{8} )?([^,]*)", line)[1] for line in path.read_text().splitlines()]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", choices=MODELS, default="mobilenet_v2")
    parser.add_argument("--weights", type=Path, required=True, help="the folder with the trained weights")
    parser.add_argument("--photo", type=Path, required=True, help="any picture that pillow can open")
    parser.add_argument("--out", type=Path, default=Path("photograph.png"), help="the picture to write")
    parser.add_argument("--short", action="store_true", help="the first preset only")
    arguments = parser.parse_args()

    model = MODELS[arguments.model]
    try:
        params = model.load(arguments.weights)
        photo = Image.open(arguments.photo).convert("RGB")
    except OSError as error:
        sys.exit(f"{parser.prog}: {error}")
    photo = photo.resize((model.size, model.size), Image.Resampling.BILINEAR)
    pixels = jnp.asarray(photo, jnp.float32)[None]

    def logits(params, pixels):
        return model.logits(params, model.preprocess(pixels))

    values = jax.jit(logits)(params, pixels)[0]
    names = class_names(arguments.weights / model.names, len(values))
    probabilities = jax.nn.softmax(values)
    print("probability   logit  class")
    for i in np.argsort(-values)[:5]:
        print(f"{probabilities[i]:11.3f} {values[i]:7.2f}  {names[i]}")

    target = int(jnp.argmax(values))
    presets = dict(list(PRESETS.items())[:1]) if arguments.short else PRESETS
    figure = Figure(figsize=(2.6 * (1 + len(presets)), 2.9), layout="constrained")
    axes = figure.subplots(1, 1 + len(presets))
    axes[0].imshow(photo)
    axes[0].set_title(names[target])
    axes[0].set_axis_off()
    print(f"\nthe relevance of the pixels for {names[target]!r}, logit {values[target]:.2f}")
    for ax, (name, rules) in zip(axes[1:], presets.items(), strict=True):
        started = time.perf_counter()
        relevance = jax.block_until_ready(jax.jit(rp.explain(logits, rules, target=target))(params, pixels))
        seconds = time.perf_counter() - started
        print(f"{name:>22}: sum {relevance.sum():9.3g}, {seconds:.1f} s with compilation")
        # A few pixels are far more relevant than all others: on a scale up to the largest, only they show.
        limit = float(jnp.quantile(jnp.abs(relevance[0].sum(axis=-1)), 0.998))
        heatmap(relevance[0], layout="HWC", ax=ax, titles=name, limit=limit)
    print("Biases absorb the rest of the logit; in MobileNetV2, with its many batch norms, nearly all of it.")
    figure.savefig(arguments.out, dpi=120)
    print(f"\nheatmaps (red speaks for the class, blue against it): {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
