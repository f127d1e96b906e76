"""Other implementations, in torch, of the same networks with the same weights. None of them is needed; all of them are

    pip install torch torchvision zennit captum tabulate matplotlib transformers==4.52.4
    pip install --no-deps lxt==2.1

A module of `GRADIENTS` rebuilds the networks of a family: its `gradient(problem)` gives a run of torch's gradient by the
input. A module of `PEERS` has the `FAMILY` that it explains, and `relevances(problem)`: for each preset that it has, a
function that prepares a run. A run takes nothing and returns an array of numpy in the layout of our input. Parameters
require no gradient.
"""

import importlib
import os

GRADIENTS = {"convolutional": "torch_convolutional", "transformer": "torch_transformers", "recurrent": "torch_recurrent"}
PEERS = {
    "zennit": "zennit_composites",
    "captum": "captum_lrp",
    "lxt": "lxt_efficient",
    "lxt explicit": "lxt_explicit",
    "torch loop": "torch_recurrent",
}


def prepare(problem, names):
    """A run of torch's gradient (None without torch), what each peer offers, and a line for each that cannot be imported."""
    offers, missing, gradient = {}, [], None
    modules = {"torch": GRADIENTS[problem.family]} | {name: PEERS[name] for name in names}
    for name, module in modules.items():
        try:
            peer = importlib.import_module(f".{module}", __package__)
        except ImportError as error:
            missing.append(f"{name} is left out: {error}")
            continue
        if name == "torch":
            import torch

            torch.set_num_threads(len(os.sched_getaffinity(0)))
            gradient = peer.gradient(problem)
        elif problem.family == peer.FAMILY:
            offers[name] = peer.relevances(problem)
    return gradient, offers, missing
