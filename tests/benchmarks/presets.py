"""What presets cost beside the gradient of the same function, and beside zennit where torch is installed.

    python -m tests.benchmarks.presets [--network vgg16|resnet50] [--presets epsilon_plus ...] [--short] ...

Times are medians of interleaved runs in float32, and ratios of these. Convolutions and dots are counted in
the compiled program; `flop` is the number of its operations beside the gradient's, by XLA's count. Neither
depends on how busy the machine is. `diff` is the distance of zennit's relevance from ours in the 2-norm,
relative, for the same weights.
"""

import argparse
import json
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import relprop as rp

from . import models

try:
    import torch
    from zennit import canonizers, composites, rules, types
    from zennit.layer import Sum
except ImportError:
    torch = None

BOX = (-2.0, 2.0)  # of the input
GRADIENTS = ("guided_backprop", "deconvnet")  # zennit returns these without the factor of the input
HEADER = (
    "preset | ours s | / our gradient | flop | conv | dot | temp MB | zennit s | / torch gradient | zennit / ours | diff"
)


def everywhere(rule):
    return composites.LayerMapComposite([*composites.layer_map_base(1e-6), (types.Linear, rule)])


# Ours, and zennit's where it has one.
PRESETS = {
    "Epsilon": (rp.Epsilon, lambda: everywhere(rules.Epsilon(1e-6))),
    "Gamma": (rp.Gamma, lambda: everywhere(rules.Gamma(0.25, 1e-6))),
    "epsilon_plus": (rp.presets.epsilon_plus, lambda: composites.EpsilonPlus()),
    "epsilon_plus_flat": (rp.presets.epsilon_plus_flat, lambda: composites.EpsilonPlusFlat()),
    "epsilon_alpha2_beta1": (rp.presets.epsilon_alpha2_beta1, lambda: composites.EpsilonAlpha2Beta1()),
    "epsilon_alpha2_beta1_flat": (
        rp.presets.epsilon_alpha2_beta1_flat,
        lambda: composites.EpsilonAlpha2Beta1Flat(),
    ),
    "epsilon_gamma_box": (
        lambda: rp.presets.epsilon_gamma_box(*BOX),
        lambda: composites.EpsilonGammaBox(*(torch.tensor(bound) for bound in BOX)),
    ),
    "deep_taylor": (lambda: rp.presets.deep_taylor(*BOX), None),
    "excitation_backprop": (rp.presets.excitation_backprop, lambda: composites.ExcitationBackprop()),
    "guided_backprop": (rp.presets.guided_backprop, lambda: composites.GuidedBackprop()),
    "deconvnet": (rp.presets.deconvnet, lambda: composites.DeconvNet()),
}


def counts(compiled):
    """Convolutions and dots of a compiled program, its operations, and the bytes that it needs for itself.

    XLA's CPU backend keeps both as instructions, most of them inside of fusions. It makes a dot of a small
    1x1 convolution, still counted as a convolution here; a build with oneDNN has custom calls.
    """
    found = {"conv": 0, "dot": 0}
    for line in compiled.as_text().splitlines():
        opcode = re.search(r" (convolution|dot|custom-call)\(", line)
        target = re.search(r'custom_call_target="[^"]*(conv|dot|matmul)', line)
        if opcode is None or (opcode[1] == "custom-call" and target is None):
            continue
        kind = target[1] if target else opcode[1]
        found["conv" if "conv_general_dilated" in line or kind.startswith("conv") else "dot"] += 1
    found["flop"] = compiled.cost_analysis().get("flops", float("nan"))
    return found | {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes}


class Ours:
    """Compiled gradients and relevances of one network at one input."""

    def __init__(self, layers, params, x, target):
        self.layers, self.target = layers, target
        self.arguments = jax.device_put((params, x))

    def network(self, params, x):
        return models.apply(self.layers, params, x)

    def gradient(self):
        def score(params, x):
            return jnp.take_along_axis(self.network(params, x), self.target[:, None], 1).sum()

        return self._compiled(jax.grad(score, argnums=1))

    def relevance(self, composite):
        return self._compiled(rp.explain(self.network, composite, target=self.target))

    def _compiled(self, fn):
        compiled = jax.jit(fn).lower(*self.arguments).compile()
        return (lambda: jax.block_until_ready(compiled(*self.arguments))), counts(compiled)


class Zennit:
    """The same of torch and zennit."""

    def __init__(self, layers, params, x, target):
        self.layers, self.params = layers, params
        self.x = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
        self.one_hot = torch.nn.functional.one_hot(torch.tensor(target, dtype=torch.int64), 1000).float()

    def _model(self):
        return torch.nn.Sequential(*models.torch_modules(self.layers, self.params)).eval()

    def _runner(self, model, weigh):
        def run():
            logits = model(self.x)
            start = self.one_hot * logits.detach() if weigh else self.one_hot
            (found,) = torch.autograd.grad(logits, self.x, start)
            return found.numpy().transpose(0, 2, 3, 1)

        return run

    def gradient(self):
        return self._runner(self._model(), False)

    def relevance(self, composite, weigh):
        """zennit's explanation, with hooks and canonizers in place: registering them is not timed."""
        model = self._model()
        for module in list(model.modules()):
            if isinstance(module, models.Residual):
                module.sum = Sum()  # what zennit's canonizer for ResNets does
        composite.canonizers = [canonizers.SequentialMergeBatchNorm()]
        composite.register(model)
        return self._runner(model, weigh)


def interleaved(runs, repeats, clock):
    """The seconds of every run, in turns: one list for each function."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def measure(names, ours, peer, repeats, clock):
    """Yield a row for the gradient's counts, and then one for every preset."""
    gradient, base = ours.gradient()
    runs = {"gradient": gradient} | ({"torch_gradient": peer.gradient()} if peer else {})
    [run() for run in runs.values()]
    seconds = interleaved(runs, repeats, clock)
    row = {"preset": "gradient", "ours": seconds["gradient"], "zennit": seconds.get("torch_gradient")}
    yield {**row, **seconds, **base, "relative_flop": 1.0}
    for name in names:
        composite, other = PRESETS[name]
        try:
            relevance, counted = ours.relevance(composite())
        except Exception as error:  # the others are of interest all the same
            yield {"preset": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        now = {"gradient": gradient, "ours": relevance}
        values = np.asarray(relevance())
        gradient()
        row = {"preset": name, **counted}
        if peer and other:
            weigh = name not in GRADIENTS
            now |= {"torch_gradient": runs["torch_gradient"], "zennit": peer.relevance(other(), weigh)}
            x = 1 if weigh else np.asarray(ours.arguments[1])
            difference = now["zennit"]() * x - values
            row["diff"] = float(np.linalg.norm(difference) / np.linalg.norm(values))
        yield {**row, **interleaved(now, repeats, clock), "relative_flop": counted["flop"] / base["flop"]}


def line(row):
    """A row of the table."""
    if "error" in row:
        return f"{row['preset']} | {row['error']}"

    def median(key):
        return statistics.median(row[key]) if row.get(key) else None

    def over(above, below):
        return median(above) / median(below) if row.get(above) and row.get(below) else None

    cells = [
        (median("ours"), ".3f"),
        (over("ours", "gradient"), ".2f"),
        (row["relative_flop"], ".2f"),
        (row["conv"], "d"),
        (row["dot"], "d"),
        (row["temp_bytes"] / 1e6, ".0f"),
        (median("zennit"), ".3f"),
        (over("zennit", "torch_gradient"), ".2f"),
        (over("zennit", "ours"), ".2f"),
        (row.get("diff"), ".0e"),
    ]
    texts = ["-" if value is None else format(value, form) for value, form in cells]
    return " | ".join([row["preset"], *texts])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=models.NETWORKS, default="vgg16")
    parser.add_argument("--batch", type=int, help="4 for vgg16, 2 for resnet50")
    parser.add_argument("--size", type=int, help="height and width, a multiple of 32; 224 by default")
    parser.add_argument("--repeats", type=int, help="of every run; 5 by default")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), metavar="NAME")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with the seconds of every run")
    parser.add_argument("--short", action="store_true", help="an eighth of the channels, 32 x 32, one repeat")
    parser.add_argument("--no-zennit", action="store_true", help="leave torch alone, installed or not")
    parser.add_argument("--cpu-time", action="store_true", help="processor time: on a busy machine, on one core")
    options = parser.parse_args(argv)
    clock = time.process_time if options.cpu_time else time.perf_counter
    build, batch = models.NETWORKS[options.network]
    size = options.size or (32 if options.short else 224)
    batch = options.batch or (2 if options.short else batch)
    layers = build(size, 8 if options.short else 64)
    rng = np.random.default_rng(0)
    params = [models.initialize(layer, rng) for layer in layers]
    x = rng.uniform(*BOX, (batch, size, size, 3)).astype(np.float32)
    target = rng.integers(0, 1000, batch).astype(np.int32)
    peer = Zennit(layers, params, x, target) if torch is not None and not options.no_zennit else None
    about = {"network": options.network, "batch": batch, "size": size, "jax": jax.__version__}
    about |= {"device": jax.devices()[0].device_kind, "clock": clock.__name__}
    print(*(f"{key} {value}" for key, value in about.items()), sep=", ")
    print(HEADER, "|".join(["---"] * len(HEADER.split("|"))), sep="\n", flush=True)
    rows, repeats = [], options.repeats or (1 if options.short else 5)
    for row in measure(options.presets, Ours(layers, params, x, target), peer, repeats, clock):
        print(line(row), flush=True)
        rows.append(row)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**about, "rows": rows}, file, indent=1)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
