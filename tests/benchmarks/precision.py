"""How far relevance is from float64 in narrower arithmetic: python -m tests.benchmarks.precision

Three ways are measured: a float32 function, the same with `backward_dtype=jnp.bfloat16`, and a function whose weights
and activations are bfloat16. The distance is relative and in the 2-norm; behind it stands one minus the cosine. Networks are
synthetic (`vgg_max`), ResNet-20 on CIFAR-10 test images, gpt-nano and all-MiniLM-L6-v2 where they are at hand.
"""

import importlib
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import relprop as rp

# Siblings of the tests and of the examples, which import each other in this way, too.
sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2] / "examples")]
gpt_nano, minilm, networks = (importlib.import_module(name) for name in ("gpt_nano", "minilm", "networks"))

WAYS = {
    "float32": (jnp.float32, None),
    "float32, backward in bfloat16": (jnp.float32, jnp.bfloat16),
    "bfloat16": (jnp.bfloat16, None),
}


def subjects():
    """Pairs of a name and a function with its parameters, input, target and presets."""
    presets = {
        "Epsilon": rp.Epsilon(),
        "epsilon_plus": rp.presets.epsilon_plus(),
        "epsilon_alpha2_beta1": rp.presets.epsilon_alpha2_beta1(),
    }
    box = rp.presets.epsilon_gamma_box(*networks.bounds("vgg_max"))
    vgg = networks.init("vgg_max"), networks.sample("vgg_max")
    yield "vgg_max", networks.vgg_max, *vgg, 2, {**presets, "epsilon_gamma_box": box}
    if (networks.SHARED / "resnet20").exists():
        images, labels = networks.cifar10(np.arange(16))
        box = rp.presets.epsilon_gamma_box(*networks.cifar10_bounds())
        resnet = networks.load_resnet(), images
        yield "ResNet-20", networks.resnet, *resnet, jnp.asarray(labels), {**presets, "epsilon_gamma_box": box}
    transformers = {"attn_lrp": rp.presets.attn_lrp()}
    if gpt_nano.FOLDER.exists():
        params, tokens = gpt_nano.load(), gpt_nano.problems()[0][::30]

        def letters(params, tokens):
            return jax.vmap(lambda t: gpt_nano.gpt(params, t))(tokens)[:, 5:]

        yield "gpt-nano", letters, params, tokens, 1, transformers
    if (folder := minilm.model_folder()) is not None:
        sentence = "The parrot watched the camera for a long time and did not move."
        tokens = jnp.asarray(minilm.load_tokenizer(folder).encode(sentence).ids)

        def features(params, tokens):
            return minilm.minilm(params, tokens)[:8].sum()

        yield "MiniLM", features, minilm.load_minilm(folder), tokens, None, transformers


def cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype if np.issubdtype(a.dtype, np.floating) else a.dtype), tree)


def distance(found, exact):
    """The relative 2-norm of the difference, and one minus the cosine."""
    found, exact = (np.asarray(v, np.float64).ravel() for v in (found, exact))
    norms = np.linalg.norm(found) * np.linalg.norm(exact)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact), 1 - found @ exact / norms


def errors(fn, params, x, target, rules):
    """The distances from float64 by way of computing."""
    with jax.enable_x64(True):
        exact = jax.jit(rp.explain(fn, rules, target=target))(*cast((params, x), jnp.float64))
    found = {}
    for way, (dtype, backward) in WAYS.items():
        explain = jax.jit(rp.explain(fn, rules, target=target, backward_dtype=backward))
        found[way] = distance(explain(*cast((params, x), dtype)), exact)
    return found


def main():
    print("| network | preset |", " | ".join(WAYS), "|")
    print("|---" * (2 + len(WAYS)) + "|")
    for name, fn, params, x, target, presets in subjects():
        for preset, rules in presets.items():
            row = errors(fn, params, x, target, rules)
            cells = " | ".join(f"{norm:.1e} ({angle:.0e})" for norm, angle in row.values())
            print(f"| {name} | {preset} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
