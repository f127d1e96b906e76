"""Real transformers in plain JAX: they compute what their authors' code computes, and explain themselves by the right words.

A Llama that writes stories, BERT as a sentence encoder, a GPT that sorts letters: examples/llama.py, examples/minilm.py,
tests/gpt_nano.py.
"""

import functools
import hashlib
import importlib.util

import gpt_nano
import jax
import jax.numpy as jnp
import llama
import minilm
import numpy as np
import pytest
from golden import load
from networks import SHARED, requires

import relprop as rp
from relprop.text import words

# A Llama.

STORIES = SHARED / "stories260k"
with_llama = requires("stories260k/stories260K.bin")
# What llama2.c prints: the expected output in its own test, temperature 0, 200 steps.
STORY = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with \
your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


@functools.cache
def stories():
    return llama.load_llama(STORIES / "stories260K.bin"), llama.Tokenizer.load(STORIES / "tok512.bin")


def shallow():
    """The parameters without the last blocks: enough where it does not matter what is written, and quicker."""
    params, _ = stories()
    return params | {"blocks": params["blocks"][:2]}


def encode(text):
    return jnp.asarray(stories()[1].encode(text), jnp.int32)


@with_llama
def test_tokenizer_merges_pairs_and_falls_back_to_bytes():
    _, tokenizer = stories()
    assert tokenizer.words(tokenizer.encode("Once upon a time")) == ["<s>", " Once", " upon", " a", " time"]
    text = 'Zoë said "ok" 🙂,\nin 1 line'
    assert tokenizer.decode(tokenizer.encode(text)) == text


@with_llama
def test_llama_writes_the_story_that_its_authors_code_writes():
    params, tokenizer = stories()
    tokens = np.zeros(201, np.int32)
    tokens[0] = llama.BEGIN
    logits = jax.jit(llama.llama)
    for position in range(1, len(tokens)):
        tokens[position] = np.argmax(logits(params, tokens)[position - 1])
    assert tokenizer.decode(tokens.tolist()) == STORY


def for_next_token(preset):
    """The logit of the likeliest next token, and the relevance of `tokens` for it."""

    @jax.jit
    def explain(params, tokens):
        logits, relevance = rp.value_and_explain(llama.llama, preset, target=lambda y: jnp.max(y[-1]))(params, tokens)
        return jnp.max(logits[-1]), relevance

    return explain


@with_llama
@pytest.mark.parametrize("preset", ["attn_lrp", "cp_lrp"])
def test_relevance_of_tokens_is_that_of_their_embeddings(preset):
    params = shallow()
    tokens, rules = encode(STORY[:60]), getattr(rp.presets, preset)()
    _, relevance = for_next_token(rules)(params, tokens)

    def top(y):
        return jnp.max(y[-1])

    embedded = jax.jit(rp.explain(llama.llama_from_embeddings, rules, target=top))(params, params["embedding"][tokens])
    assert relevance.shape == tokens.shape
    assert np.all(np.isfinite(relevance))
    np.testing.assert_allclose(relevance, embedded.sum(-1), rtol=1e-4, atol=1e-4)


@with_llama
def test_relevance_sums_to_the_logit_where_nothing_absorbs_it():
    """There are no biases, and in CP-LRP the attention is constant: tokens have all of the logit."""
    params, _ = stories()
    rules = [("affine", rp.Zero()), *rp.presets.cp_lrp()]
    logit, relevance = for_next_token(rules)(params, encode(STORY[:60]))
    np.testing.assert_allclose(relevance.sum(), logit, rtol=1e-5)


@with_llama
def test_tokens_that_come_later_have_no_relevance():
    fn = jax.jit(rp.explain(llama.llama, rp.presets.attn_lrp(), target=lambda y: jnp.max(y[5])))
    relevance = fn(shallow(), encode(STORY[:60]))
    assert np.all(relevance[6:] == 0)
    assert np.all(relevance[:6] != 0)


@with_llama
def test_she_is_due_to_the_girl_and_he_to_the_boy():
    """What speaks for ' she' rather than ' he' after a story of a girl, and the other way round, before 'One day,'."""
    params, tokenizer = stories()
    (she,), (he,) = tokenizer.encode("she")[1:], tokenizer.encode("he")[1:]

    @jax.jit
    def explain(params, tokens):
        def she_rather_than_he(y):
            return y[-1, she] - y[-1, he]

        value, relevance = rp.value_and_explain(llama.llama, rp.presets.attn_lrp(), target=she_rather_than_he)(
            params, tokens
        )
        return she_rather_than_he(value), relevance

    for who, name, sign in (("girl", "Lily", 1), ("boy", "Tim", -1)):
        tokens = encode(f"Once upon a time, there was a little {who} named {name}. One day,")
        value, relevance = explain(params, tokens)
        merged, relevance = words(tokenizer.words(tokens.tolist()), np.asarray(relevance), marker=" ")
        relevance = dict(zip((word.strip(" .,") for word in merged[:-2]), sign * relevance, strict=False))
        assert sign * value > 0
        assert {who, name} == set(sorted(relevance, key=relevance.get)[-2:])


# A sentence encoder.

with_minilm = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (minilm.PACKAGE, "safetensors", "tokenizers")),
    reason=f"needs {minilm.PACKAGE.replace('_', '-')}, safetensors, tokenizers",
)


@functools.cache
def encoder():
    return minilm.load_minilm(minilm.model_folder()), minilm.load_tokenizer(minilm.model_folder())


@with_minilm
@pytest.mark.parametrize("i", range(4))
def test_embedding_is_that_of_the_published_model(i):
    params, tokenizer = encoder()
    with load("minilm") as golden:
        weights = (minilm.model_folder() / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == golden["digest"]
        encoded = tokenizer.encode(str(golden["sentences"][i]))
        np.testing.assert_array_equal(encoded.ids, golden[f"tokens_{i}"])
        embedding = jax.jit(minilm.minilm)(params, jnp.asarray(encoded.ids, jnp.int32))
        np.testing.assert_allclose(embedding, golden[f"embedding_{i}"], rtol=0, atol=1e-5)


SHIFTS = ("bias", "position", "type")


def split(params):
    """The parameters without what is added, and what is added."""
    leaves, form = jax.tree_util.tree_flatten_with_path(params)
    shifts = [path[-1].key in SHIFTS for path, _ in leaves]
    rest = form.unflatten([None if shift else leaf for shift, (_, leaf) in zip(shifts, leaves, strict=True)])
    added = form.unflatten([leaf if shift else None for shift, (_, leaf) in zip(shifts, leaves, strict=True)])
    return rest, added


def join(rest, added):
    return jax.tree.map(lambda a, b: b if a is None else a, rest, added, is_leaf=lambda leaf: leaf is None)


PAIR = ("The cat sleeps on the sofa.", "A kitten is napping on the couch.")


@with_minilm
def test_pairs_of_words_and_biases_sum_to_the_cosine():
    """The relevance of all that is added (biases, positions) stands beside that of the words, as one more of them."""
    params, tokenizer = encoder()
    rest, added = split(params)
    tokens = [jnp.asarray(tokenizer.encode(sentence).ids, jnp.int32) for sentence in PAIR]
    rules = [("affine", rp.Zero()), *rp.presets.cp_lrp()]

    def words_and_biases(relevance):
        of_added, of_tokens = relevance
        return jnp.append(of_tokens, sum(leaf.sum() for leaf in jax.tree.leaves(of_added)))

    @jax.jit
    def explain(rest, added, x, y):
        def fn(added, tokens):
            return minilm.minilm(join(rest, added), tokens)

        return rp.bilrp(fn, rules, argnums=(0, 1), pool=words_and_biases, batch_size=32)(added, x, y)

    found = explain(rest, added, *tokens)
    assert np.abs(found.left[:, -1]).max() > 0.01  # biases do absorb
    np.testing.assert_allclose(found.joint.sum(), found.value, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.left_kept, 0, atol=1e-6)


@with_minilm
def test_similar_words_go_together():
    import sentence_similarity

    params, tokenizer = encoder()
    encoded = [tokenizer.encode(sentence) for sentence in PAIR]
    rules = [("affine", rp.Zero()), *rp.presets.cp_lrp()]
    found = jax.jit(rp.bilrp(minilm.minilm, rules))(params, *(jnp.asarray(each.ids, jnp.int32) for each in encoded))
    left, of_left = sentence_similarity.merge(encoded[0].tokens, found.left)
    right, of_right = sentence_similarity.merge(encoded[1].tokens, found.right)
    joint = of_left.T @ of_right
    assert float(found.value) == pytest.approx(0.741, abs=1e-3)
    np.testing.assert_allclose(joint.sum() + float(found.kept), float(found.value), rtol=0, atol=1e-5)
    for word, counterpart in {"cat": "kitten", "sleeps": "napping", "sofa": "couch", "on": "on"}.items():
        row, column = joint[left.index(word)], joint[:, right.index(counterpart)]
        assert right[np.argmax(row)] == counterpart
        assert left[np.argmax(column)] == word


# A GPT that sorts.

with_gpt = requires("gpt_nano/gpt_nano_sort.npz")


@functools.cache
def sorter():
    return jax.tree.map(lambda v: v.astype(jnp.float64), gpt_nano.load())


run = jax.jit(jax.vmap(gpt_nano.gpt, in_axes=(None, 0)))


@with_gpt
def test_logits_are_those_of_the_original():
    tokens, logits = gpt_nano.stored_run()
    np.testing.assert_allclose(run(sorter(), tokens), logits, rtol=0, atol=2e-6)


@with_gpt
def test_sorts_every_input():
    tokens, ordered = gpt_nano.problems()
    assert len(tokens) == 729
    written = tokens * (np.arange(tokens.shape[1]) < gpt_nano.LENGTH)  # without the solution
    for i in range(gpt_nano.LENGTH):
        letters = np.argmax(run(sorter(), written)[:, gpt_nano.LENGTH - 1 + i], axis=-1)
        np.testing.assert_array_equal(letters, ordered[:, i])
        if i < gpt_nano.LENGTH - 1:
            written[:, gpt_nano.LENGTH + i] = letters


def rollout(params, tokens):
    """Attention rollout (Abnar and Zuidema 2020): attention, averaged over heads, mixed with the residual, multiplied up."""
    flow = identity = jnp.eye(len(tokens))
    for weights in gpt_nano.attention_weights(params, tokens):
        flow = (weights.mean(0) + identity) / 2 @ flow
    return flow


def share_on_letter(relevance, tokens, letters):
    """The mean share of positive relevance (examples, outputs, positions) on the positions that hold the output's letter."""
    positive = np.maximum(relevance, 0)
    total = positive.sum(-1)
    same = tokens[:, None, :] == letters[:, :, None]
    # Where nothing is positive there is no share; leaving that out favours who has such cases.
    return ((positive * same).sum(-1)[total > 0] / total[total > 0]).mean()


@with_gpt
def test_explanation_is_on_the_letter_that_is_written():
    """More than that of attention rollout and of gradient x input, and far more than chance."""
    params = sorter()
    tokens, letters = gpt_nano.problems()
    chosen = np.random.default_rng(0).choice(len(tokens), 200, replace=False)
    tokens, letters = tokens[chosen], letters[chosen]
    outputs = np.arange(gpt_nano.LENGTH - 1, tokens.shape[1], dtype=np.int32)

    def every_output(explain):
        """`explain(tokens, position, letter)` for every example and output."""
        over_outputs = jax.vmap(explain, in_axes=(None, 0, 0))
        return np.asarray(jax.jit(jax.vmap(over_outputs, in_axes=(0, None, 0)))(tokens, outputs, letters))

    def lrp(tokens, position, letter):
        return rp.explain(gpt_nano.gpt, rp.presets.attn_lrp(), target=lambda y: y[position, letter])(params, tokens)

    def gradient_times_input(tokens, position, letter):
        x = params["letter"][tokens]
        return (x * jax.grad(lambda x: gpt_nano.gpt_from_embeddings(params, x)[position, letter])(x)).sum(-1)

    visible = np.arange(tokens.shape[1]) <= outputs[:, None]
    shares = {
        "chance": np.broadcast_to(visible, (len(tokens), *visible.shape)),
        "rollout": np.asarray(jax.vmap(rollout, in_axes=(None, 0))(params, jnp.asarray(tokens)))[:, outputs],
        "gradient x input": every_output(gradient_times_input),
        "attn_lrp": every_output(lrp),
    }
    shares = {name: share_on_letter(relevance, tokens, letters) for name, relevance in shares.items()}
    print(shares)
    assert shares["attn_lrp"] > 0.88
    assert shares["attn_lrp"] > max(shares["rollout"], shares["gradient x input"]) + 0.15
