"""Why does a language model write this word? Relevance of every word so far for the next one.

    pip install "relprop[examples]"
    python examples/language_model.py --model stories260K.bin --tokenizer tok512.bin

The two files are those of a Llama that was trained on short stories, in the layout of llama2.c (llama.py says which).
It continues --prompt. Explained are: what comes next, one word --rather than another, in the terminal; every step of the
writing, in --out (.html), and beside it in a picture (.png) of which token each generated token is due to.
"""

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from llama import Tokenizer, llama, load_llama
from matplotlib.figure import Figure

import relprop as rp
from relprop.plot import heatmap
from relprop.text import html, terminal, words

PROMPT = "Once upon a time, there was a little girl named Lily. One day,"
PRESETS = {"attn_lrp": rp.presets.attn_lrp(), "cp_lrp": rp.presets.cp_lrp()}


def generate(params, tokens, steps):
    """`tokens` and the `steps` likeliest tokens after them, one by one."""
    tokens = jnp.asarray(tokens, jnp.int32)
    # The model looks back only, so zeros that stand for tokens to come change nothing, and one length is compiled.
    padded = jnp.pad(tokens, (0, steps))

    @jax.jit
    def step(padded, position):
        likeliest = jnp.argmax(llama(params, padded)[position - 1])
        return padded.at[position].set(likeliest.astype(padded.dtype))

    for position in range(len(tokens), len(padded)):
        padded = step(padded, position)
    return padded


@functools.partial(jax.jit, static_argnames="preset")
def explain_token(params, tokens, position, preset):
    """The logit of the token at `position`, and the relevance of each of `tokens` for it, 0 from `position` on."""

    def logit(logits):
        return logits[position - 1, tokens[position]]

    logits, relevance = rp.value_and_explain(llama, PRESETS[preset], target=logit)(params, tokens)
    return logit(logits), relevance


@functools.partial(jax.jit, static_argnames="preset")
def explain_choice(params, tokens, this, that, preset):
    """How much larger the logit of `this` is than that of `that` as the next token, and the relevance of `tokens` for it."""

    def difference(logits):
        return logits[-1, this] - logits[-1, that]

    logits, relevance = rp.value_and_explain(llama, PRESETS[preset], target=difference)(params, tokens)
    return difference(logits), relevance


def matrix(relevance, pieces, prompt):
    """A picture of `relevance` (generated tokens, all tokens)."""
    figure = Figure(figsize=(2 + 0.16 * len(pieces), 2 + 0.16 * len(relevance)), layout="constrained")
    ax = figure.subplots()
    # The last token always matters most, as it has to be completed: on a scale up to it, only it shows.
    heatmap(relevance[:, :-1], ax=ax, limit=float(np.quantile(np.abs(relevance), 0.98)))
    ax.set_axis_on()
    ax.set_xticks(range(len(pieces) - 1), [piece.strip() for piece in pieces[:-1]], rotation=90, fontsize="x-small")
    ax.set_yticks(range(len(relevance)), [piece.strip() for piece in pieces[prompt:]], fontsize="x-small")
    ax.set_xlabel("relevance of the token")
    ax.set_ylabel("for the generated token")
    return figure


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, required=True, help="the weights, for example stories260K.bin")
    parser.add_argument("--tokenizer", type=Path, required=True, help="its tokenizer, for example tok512.bin")
    parser.add_argument("--prompt", default=PROMPT, help="what the model continues")
    parser.add_argument("--rather", nargs=2, default=["she", "he"], metavar="WORD", help="two words that could come next")
    parser.add_argument("--steps", type=int, default=40, help="how many tokens it writes")
    parser.add_argument("--preset", choices=PRESETS, default="attn_lrp")
    parser.add_argument("--out", type=Path, default=Path("language_model.html"), help="the page to write")
    parser.add_argument("--short", action="store_true", help="write four tokens only")
    arguments = parser.parse_args()

    try:
        params, tokenizer = load_llama(arguments.model), Tokenizer.load(arguments.tokenizer)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    prompt = tokenizer.encode(arguments.prompt)

    this, that = (tokenizer.encode(word)[1] for word in arguments.rather)
    choice, relevance = explain_choice(params, jnp.asarray(prompt, jnp.int32), this, that, arguments.preset)
    text, relevance = words(tokenizer.words(prompt), relevance, marker=" ")
    title = f"why {arguments.rather[0]!r} rather than {arguments.rather[1]!r}: {float(choice):+.2f}"
    print(terminal(text, relevance, titles=title, numbers=True))

    tokens = generate(params, prompt, 4 if arguments.short else arguments.steps)
    pieces = tokenizer.words(tokens.tolist())
    print(f"\n{tokenizer.decode(tokens.tolist())}")

    steps = range(len(prompt), len(tokens))
    logits, relevance = zip(*(explain_token(params, tokens, step, arguments.preset) for step in steps), strict=True)
    relevance = np.stack(relevance)
    titles = [f"{pieces[step]!r}: logit {float(z):.2f}" for step, z in zip(steps, logits, strict=True)]
    texts, values = zip(
        *(words(pieces[:step], row[:step], marker=" ") for step, row in zip(steps, relevance, strict=True)), strict=True
    )
    print(f"\n{'token':>10} {'logit':>7} {'relevance':>9}  the three most relevant words")
    for step, z, text, value in list(zip(steps, logits, texts, values, strict=True))[:16]:
        best = ", ".join(f"{text[i].strip()!r} {value[i]:.2f}" for i in np.argsort(-value)[:3])
        print(f"{pieces[step]!r:>10} {z:7.2f} {value.sum():9.2f}  {best}")
    print("What the sum lacks of the logit has stayed in the softmax of attention; with --preset cp_lrp nothing does.")

    arguments.out.write_text(html(texts, values, titles=titles), encoding="utf-8")
    picture = arguments.out.with_suffix(".png")
    matrix(relevance, pieces, len(prompt)).savefig(picture, dpi=120)
    print(f"\nevery step: {arguments.out.resolve()}, {picture.resolve()}")


if __name__ == "__main__":
    main()
