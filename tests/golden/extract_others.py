"""Small extracts of values that other implementations keep in their own test suites, for comparison.

    pip install h5py
    python tests/golden/extract_others.py FOLDER

FOLDER holds `julia_rules.npz` and `julia_LICENSE` of RelevancePropagation.jl, and a folder `innvestigate`
with the .hdf5 files and the LICENSE of iNNvestigate (its tests/references/layer). Writes beside this script

    julia_rules.npz           everything, as it is: the layers of test/test_rules.jl, inputs and relevances
    innvestigate_layers.npz   for each layer "<layer>/weights" and "<layer>/attribution", one row per analyser
                              in the order of "analyzers"; all share one "input". Biases are 0 and left out
    *_LICENSE                 the licence texts
"""

import pathlib
import shutil
import sys

import h5py
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent

LAYERS = ("Dense", "Dense_relu", "Conv2D", "Conv2D_relu", "AveragePooling2D", "MaxPooling2D")
# Not taken: SmoothGrad, which is random, and IntegratedGradients, which is not relevance propagation.
ANALYZERS = (
    "Gradient",
    "InputTimesGradient",
    "GuidedBackprop",
    "Deconvnet",
    "DeepTaylor",
    "BoundedDeepTaylor",
    "LRPZ",
    "LRPZIgnoreBias",
    "LRPZ_Flat_input_layer_rule",
    "LRPZ_boxed_input_layer_rule",
    "LRPEpsilon",
    "LRPEpsilonIgnoreBias",
    "LRPZPlus",
    "LRPZPlusFast",
    "LRPAlpha1Beta0",
    "LRPAlpha1Beta0IgnoreBias",
    "LRPAlpha2Beta1",
    "LRPAlpha2Beta1IgnoreBias",
    "LRPFlat",
    "LRPWSquare",
    "LRPSequentialPresetA",
    "LRPSequentialPresetAFlat",
    "LRPSequentialPresetB",
    "LRPSequentialPresetBFlat",
)


def innvestigate(folder):
    """The arrays of `innvestigate_layers.npz`."""
    arrays = {"analyzers": np.array(ANALYZERS)}
    rows = {f"{layer}/{kind}": [] for layer in LAYERS for kind in ("weights", "attribution")}
    for analyzer in ANALYZERS:
        with h5py.File(folder / f"{analyzer}.hdf5") as stored:
            x = stored["input"][()]
            if not np.array_equal(arrays.setdefault("input", x), x):
                raise ValueError(f"{analyzer}: its input is not that of {ANALYZERS[0]}")
            for layer in LAYERS:
                weights = [array[()] for array in stored[layer]["weights"].values()]
                if weights:
                    kernel, bias = weights
                    rows[f"{layer}/weights"].append(kernel)
                    if np.any(bias):
                        raise ValueError(f"{analyzer}, {layer}: a bias is not zero")
                rows[f"{layer}/attribution"].append(stored[layer]["attribution"][()])
    return arrays | {name: np.stack(row) for name, row in rows.items() if row}


def main(folder):
    shutil.copyfile(folder / "julia_rules.npz", HERE / "julia_rules.npz")
    shutil.copyfile(folder / "julia_LICENSE", HERE / "julia_LICENSE")
    np.savez_compressed(HERE / "innvestigate_layers.npz", **innvestigate(folder / "innvestigate"))
    shutil.copyfile(folder / "innvestigate" / "LICENSE", HERE / "innvestigate_LICENSE")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
