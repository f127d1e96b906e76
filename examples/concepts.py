"""What a network of handwritten digits sees: where relevance goes, and which of its channels speak for an 8.

    pip install "relprop[examples]"
    python examples/concepts.py

trains the network of quickstart.py, prints an audit of its relevance, finds for every channel of an inner layer the
digits that it matters most for, explains some digits channel by channel, and draws it all as one picture.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from quickstart import CNN, load, train

import relprop as rp
from relprop.plot import heatmap

RULES = rp.presets.epsilon_plus()
LAYER = "params/Conv_1/kernel"
DIGITS = (3, 8)
CHANNELS = 3  # that are shown for each digit
REFERENCES = 5  # of each kind that are shown for each channel


def by_channel(fn, params, x, target):
    """The relevance of the channels of LAYER (channels,), and the heatmap (channels, ...) of each, for a batch of one."""
    located = rp.relevances(fn, RULES, at=LAYER, target=target)(params, x)
    relevance = rp.pool.channels(located[LAYER].relevance)[0]

    def through(mask):
        return rp.explain(fn, RULES, target=target, conditions=rp.condition(LAYER, mask))(params, x)

    # Masks are data: one forward pass and one pass backwards from the output to the layer serve all channels.
    return relevance, jax.vmap(through)(jnp.eye(len(relevance), dtype=x.dtype))


def find_references(fn, params, images, target, batch=256):
    """The images in which the channels of LAYER are most active, and those in which they speak most for `target`."""
    update = rp.concepts.references(fn, RULES, at=LAYER, count=REFERENCES, target=target)
    found = None
    for first in range(0, len(images), batch):
        found = update(found, params, images[first : first + batch])
    return found


def in_view(images, ranking, boxes):
    """For each channel its best images (height, width), dimmed outside of what the channel's best unit sees of them."""
    found = []
    for examples, row in zip(np.asarray(ranking.example), np.asarray(boxes), strict=True):
        found.append([])
        for example, box in zip(examples[examples >= 0], row, strict=False):
            light = np.full(images[example].shape, 0.3)
            light[tuple(slice(*ends) for ends in box)] = 1
            found[-1].append((images[example] * light)[..., 0])
    return found


def draw(explained):
    """One picture: a block of rows for each explained digit, a row for each channel."""
    columns = 3 + 2 * REFERENCES
    figure = Figure(figsize=(columns * 0.95, 1.15 * CHANNELS * len(explained) + 0.4), layout="constrained")
    panels = figure.subplots(CHANNELS * len(explained), columns, squeeze=False)
    for ax in panels.ravel():
        ax.set_axis_off()
    for block, (digit, image, relevance, heatmaps, references) in enumerate(explained):
        rows = panels[CHANNELS * block : CHANNELS * (block + 1)]
        rows[0, 0].imshow(image[..., 0], cmap="gray")
        rows[0, 0].set_title(f"digit {digit}", fontsize="small")
        heatmap(heatmaps.sum(0), layout="HWC", ax=rows[0, 1])
        rows[0, 1].set_title("all", fontsize="small")
        for row, channel in zip(rows, np.argsort(-relevance)[:CHANNELS], strict=True):
            heatmap(heatmaps[channel], layout="HWC", ax=row[2])
            row[2].set_title(f"{channel}: {relevance[channel]:+.2f}", fontsize="small")
            for first, images in zip((3, 3 + REFERENCES), references, strict=True):
                for ax, picture in zip(row[first:], images[channel], strict=False):
                    ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        rows[0, 3].set_title(f"matter most for the {digit}", fontsize="small", loc="left")
        rows[0, 3 + REFERENCES].set_title("most active", fontsize="small", loc="left")
    return figure


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, default=Path("concepts.png"), help="the picture to write")
    parser.add_argument("--short", action="store_true", help="train for a moment only")
    arguments = parser.parse_args()

    started = time.perf_counter()

    def fn(params, x):
        return CNN().apply(params, x)

    (images, labels), (test_images, test_labels) = load()
    params = train(CNN(), images, labels, steps=100 if arguments.short else 600)
    predicted = jnp.argmax(jax.jit(fn)(params, test_images), axis=-1)
    print(f"trained in {time.perf_counter() - started:.1f} s, test accuracy {np.mean(predicted == test_labels):.1%}")

    print("\nwhy does the relevance of the pixels not sum to the logit? The first test image of each digit:\n")
    x = jnp.stack([test_images[np.argmax(test_labels == digit)] for digit in range(10)])
    print(jax.jit(rp.audit(fn, RULES, target=jnp.arange(10), batched=True))(params, x))

    boxes = jax.jit(rp.concepts.receptive_field(fn, at=LAYER))
    explained = []
    for digit in DIGITS:
        image = test_images[np.argmax(test_labels == digit)]
        explain = jax.jit(lambda params, x, digit=digit: by_channel(fn, params, x, digit))
        relevance, heatmaps = (np.asarray(array) for array in explain(params, image[None]))
        heatmaps = heatmaps[:, 0]
        found = find_references(fn, params, images, digit)
        rankings = (found.relevance, found.activation)
        references = [in_view(images, each, boxes(each.position, params, images)) for each in rankings]
        explained.append((digit, image, relevance, heatmaps, references))
        print(f"\na {digit}: the channels of {LAYER} that matter most, and the digits that they are most active for")
        for channel in np.argsort(-relevance)[:CHANNELS]:
            digits = labels[np.asarray(found.activation.example[channel])]
            print(f"  channel {channel:2}  relevance {relevance[channel]:6.2f}   {' '.join(map(str, digits))}")
        sums = f"relevance {relevance.sum():6.2f}   pixels {heatmaps.sum():.2f}, biases keep the rest"
        print(f"  all {len(relevance)}      {sums}")

    draw(explained).savefig(arguments.out, dpi=120)
    print(f"\nchannels and what they see (what their best unit does not see is dim): {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
