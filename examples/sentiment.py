"""Is this sentence praise or blame, and which words say so? A bidirectional LSTM, trained and explained.

    pip install "relprop[examples]"
    python examples/sentiment.py                     # learns from forty sentences in this file: a toy
    python examples/sentiment.py --data SST2         # train.tsv and test.tsv of SST-2

A line of the files is a sentence, a tab, and 1 for praise or 0 for blame. Gates are held constant and the signals take
all of the relevance, as in Arras et al. 2017 (https://arxiv.org/abs/1706.07206).
"""

import argparse
import collections
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import relprop as rp
from relprop.text import html, terminal

PRAISE = """
a wonderful film with a great cast
this is a great and moving story
i loved every minute of it
funny , warm and beautifully acted
the best film of the year
a clever script and a charming hero
it is not bad at all
an excellent and touching drama
great fun for the whole family
a brilliant , beautiful and moving film
the acting is wonderful
not boring for a minute
what a charming and clever comedy
i enjoyed the story and loved the music
a warm and funny family film
the cast is excellent and the music is beautiful
never dull and often brilliant
an enjoyable film with a clever story
the best comedy i have seen
a moving and honest drama
"""
BLAME = """
a terrible film with an awful cast
this is a boring and silly story
i hated every minute of it
dull , cold and badly acted
the worst film of the year
a stupid script and a tedious hero
it is not good at all
a poor and lifeless drama
no fun for the whole family
a tedious , ugly and boring film
the acting is terrible
not funny for a minute
what a dull and stupid comedy
i disliked the story and hated the music
a cold and boring family film
the cast is poor and the music is awful
never funny and often tedious
an awful film with a silly story
the worst comedy i have seen
a lifeless and dull drama
"""
TRY = ["the story is not good", "a great cast in a boring film", "never dull and beautifully acted"]
UNKNOWN = 1  # the number of every word that is not in the vocabulary; 0 fills up short sentences


class Sentiment(nn.Module):
    """Numbers of words (N, time), zeros at the end -> logits (N, 2) of blame and praise."""

    words: int
    features: int = 64
    hidden: int = 64

    @nn.compact
    def __call__(self, tokens, train=False):
        lengths = jnp.sum(tokens != 0, axis=1)
        # Words are left out in training, so that no single one decides.
        x = nn.Embed(self.words, self.features)(tokens)
        x = nn.Dropout(0.5, broadcast_dims=(2,), deterministic=not train)(x)
        x = nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(self.hidden)), nn.RNN(nn.OptimizedLSTMCell(self.hidden)))(
            x, seq_lengths=lengths
        )
        # The largest value over time of each feature: winner takes all of its relevance.
        real = (tokens != 0)[..., None]
        x = jnp.max(jnp.where(real, x, -1.0), axis=1)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(2)(x)


def read(path):
    """Sentences and labels of a file of SST-2."""
    lines = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return [sentence.split() for sentence, _ in lines], np.array([int(label) for _, label in lines])


def load(folder):
    """(sentences, labels) to train on, and to test on."""
    if folder is not None:
        return [read(folder / f"{part}.tsv") for part in ("train", "test")]
    sentences = [line.split() for text in (PRAISE, BLAME) for line in text.strip().splitlines()]
    whole = sentences, np.repeat([1, 0], len(sentences) // 2)
    parts = [np.arange(len(sentences)) % 5 != 4, np.arange(len(sentences)) % 5 == 4]
    return [([s for s, on in zip(sentences, part, strict=True) if on], whole[1][part]) for part in parts]


def numbers(sentences, vocabulary, length):
    """The numbers of words (N, length), 0 behind the last word."""
    tokens = np.zeros((len(sentences), length), np.int32)
    for row, sentence in zip(tokens, sentences, strict=True):
        known = [vocabulary.get(word, UNKNOWN) for word in sentence[:length]]
        row[: len(known)] = known
    return tokens


def train(model, tokens, labels, epochs, batch):
    """Parameters after `epochs` passes over the sentences."""
    params = model.init(jax.random.key(0), tokens[:1])
    count = len(tokens) // batch
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, epochs * count))

    @jax.jit
    def step(params, state, x, y, key):
        def loss(params):
            logits = model.apply(params, x, train=True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    for epoch in range(epochs):
        order = rng.permutation(len(tokens))
        for i in range(count):
            chosen = order[i * batch : (i + 1) * batch]
            key = jax.random.key(epoch * count + i)
            params, state = step(params, state, tokens[chosen], labels[chosen], key)
    return params


def praise(logits):
    """What is explained: how much more it is praise than blame, for each sentence."""
    return logits[:, 1] - logits[:, 0]


def extremes(texts, relevances, count=8):
    """The words with the highest and with the lowest mean relevance among those that occur five times or more."""
    found = collections.defaultdict(list)
    for text, relevance in zip(texts, relevances, strict=True):
        for word, value in zip(text, relevance, strict=True):
            found[word].append(value)
    mean = {word: np.mean(values) for word, values in found.items() if len(values) >= 5}
    ranked = sorted(mean, key=mean.get)
    return ranked[: -count - 1 : -1], ranked[:count]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, help="a folder with train.tsv and test.tsv")
    parser.add_argument("--out", type=Path, default=Path("sentiment.html"), help="the page to write")
    parser.add_argument("--short", action="store_true", help="train for a moment only")
    arguments = parser.parse_args()

    started = time.perf_counter()
    try:
        (texts, labels), (test_texts, test_labels) = load(arguments.data)
    except OSError as error:
        sys.exit(f"{parser.prog}: {error}")
    rare = 1 if arguments.data is None else 2
    count = collections.Counter(word for text in texts for word in text)
    vocabulary = {word: i for i, word in enumerate(sorted(w for w in count if count[w] >= rare), UNKNOWN + 1)}
    length = min(40, max(map(len, [*texts, *test_texts])))
    model = Sentiment(words=UNKNOWN + 1 + len(vocabulary))
    batch, epochs = (64, 6) if arguments.data else (8, 30)
    if arguments.short:
        epochs = 1 if arguments.data else 10
    params = train(model, numbers(texts, vocabulary, length), labels, epochs, batch)

    tokens = numbers(test_texts, vocabulary, length)
    predicted = np.argmax(jax.jit(model.apply)(params, tokens), axis=-1)
    accuracy = np.mean(predicted == test_labels)
    print(f"trained in {time.perf_counter() - started:.1f} s, accuracy on {len(tokens)} test sentences {accuracy:.1%}")

    # Of praise rather than blame; biases keep what the words have not got.
    shown = [text[:length] for text in [*(text.split() for text in TRY), *test_texts[:1000]]]
    explain = jax.jit(rp.value_and_explain(model.apply, rp.presets.lstm(), target=praise))
    logits, relevance = explain(params, numbers(shown, vocabulary, length))
    values = [row[: len(text)] for row, text in zip(np.asarray(relevance), shown, strict=True)]
    titles = [
        f"{'praise' if score > 0 else 'blame'} {score:+.2f}, of which the words have {value.sum():+.2f}"
        for score, value in zip(praise(logits), values, strict=True)
    ]
    few = 12
    print("\nred words speak for praise, blue ones for blame; biases have the rest\n")
    print(terminal(shown[:few], values[:few], titles=titles[:few], limit="shared"))
    arguments.out.write_text(html(shown[:100], values[:100], titles=titles[:100]), encoding="utf-8")

    if arguments.data:  # the toy has too few sentences
        best, worst = extremes(shown, values)
        print("\nmost for praise on average:", ", ".join(best))
        print("most for blame on average: ", ", ".join(worst))
    print(f"\nthe sentences in colour: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
