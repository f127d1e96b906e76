"""What presets cost beside the gradient of the same network, and beside other implementations in torch.

    python -m tests.benchmarks [--network vgg16 ...] [--presets epsilon_plus ...] [--short] [--json FILE] ...

Everything is float32 with random weights, the same in JAX and in torch, on all cores that this process may use. Seconds are
medians of runs in turns, ratios are those of medians:

    / grad        ours beside JAX's gradient by the input; of the compilation, too
    conv, dot     products in the compiled program, the body of a loop once; / flop: its operations beside the gradient's
    MB, / MB      what the program needs beside arguments and results; beside the gradient's
    / torch grad  the peer's beside torch's gradient by the input of the same network
    / ours        the peer's time beside ours
    diff          distance of the peer's relevance from ours, relative, in the 2-norm

Peers are those that can be imported: see tests/benchmarks/peers.
"""

import argparse
import gc
import json
import sys

import jax

from . import peers
from .measure import measure
from .networks import NETWORKS
from .report import Table, machine


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help="; ".join(NETWORKS)
    )
    parser.add_argument("--presets", nargs="+", metavar="NAME", help="those of each network that are named; all by default")
    parser.add_argument(
        "--peers", nargs="+", choices=peers.PEERS, default=list(peers.PEERS), metavar="NAME", help="; ".join(peers.PEERS)
    )
    parser.add_argument("--no-peers", action="store_true", help="leave torch alone, installed or not")
    parser.add_argument("--batch", type=int, help="examples; each network has its own number of them")
    parser.add_argument("--repeats", type=int, help="of every run; 5, or 1 with --short")
    parser.add_argument("--short", action="store_true", help="small networks, to see that all of it runs")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--json", metavar="FILE", help="write everything, with the seconds of every run")
    return parser.parse_args(argv)


def main(argv=None):
    options = arguments(argv)
    found = {"machine": machine(), "networks": []}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    for name in options.network:
        problem = NETWORKS[name](short=options.short, batch=options.batch)
        presets = [preset for preset in problem.presets if not options.presets or preset in options.presets]
        if presets:
            rows = run(problem, presets, options)
            found["networks"].append({"network": name, "input": problem.x.shape, "rows": rows})
        del problem
        jax.clear_caches()
        gc.collect()
        if options.json:
            with open(options.json, "w") as file:
                json.dump(found, file, indent=1)
    return int(any("error" in row for network in found["networks"] for row in network["rows"]))


def run(problem, presets, options):
    """The rows of a network, printed one by one."""
    gradient, offers = None, {}
    if not options.no_peers:
        gradient, offers, missing = peers.prepare(problem, options.peers)
        if missing:
            print(*missing, sep="\n")
    table = Table(options.markdown)
    print(f"\n{problem.name}, input {problem.shape}\n", *table.head(), sep="\n", flush=True)
    rows = []
    for row in measure(problem, presets, options.repeats or (1 if options.short else 5), gradient, offers):
        print(*table.lines(row), sep="\n", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
