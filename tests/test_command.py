"""The command line, run on a small model in the working folder."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as orbax
import pytest
import safetensors.numpy
import zarr

import relprop as rp
from relprop import bench, command

MODEL = """
import jax, numpy as np
import relprop as rp

class Namespace:
    @staticmethod
    def network(params, x):
        return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["dense"]["kernel"]) @ params["out"]

network = Namespace.network
number = 3
composite = [("dense", rp.Gamma(0.5))]

def a():
    return [("dense", rp.ZBox(np.zeros(48), np.full(48, 255.0)))]

def b():
    return [("dense", rp.ZBox(np.full(48, -1.0), np.full(48, 255.0)))]

def bare(x):
    return x.reshape(x.shape[0], -1) @ np.ones((48, 4), np.float32)

def weights():
    arrays = np.load("weights.npz")
    return {"dense": {"kernel": arrays["dense/kernel"]}, "out": arrays["out"]}

def batches():
    data = np.load("data.npz")
    return [(data["image"][i : i + 8].astype("f4"), data["label"][i : i + 8]) for i in (0, 8, 16)]

def nan(x):
    return bare(x) / 0.0

def forgetful(x):
    raise TypeError("a mistake of one's own")
"""
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (20, 4, 4, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 5, 20)
KERNEL, OUT = RNG.normal(size=(48, 7)).astype(np.float32), RNG.normal(size=(7, 5)).astype(np.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a module, weights and data in every form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "model_of_the_test", raising=False)
    Path("model_of_the_test.py").write_text(MODEL)
    weights = {"dense/kernel": KERNEL, "out": OUT}
    np.savez("weights.npz", **weights)
    safetensors.numpy.save_file(weights, "weights.safetensors")
    np.savez("data.npz", image=IMAGES, label=LABELS)
    np.save("images.npy", IMAGES)
    Path("data").mkdir()
    np.save("data/image.npy", IMAGES)
    np.save("data/label.npy", LABELS)
    np.save("data/index.npy", np.arange(20) + 7)
    return tmp_path


def network(params, x):
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["dense"]["kernel"]) @ params["out"]


PARAMS = {"dense": {"kernel": KERNEL}, "out": OUT}
NETWORK = "model_of_the_test:network"


def relprop(*arguments):
    return command.main(list(map(str, arguments)))


FORMS = {
    "npz": ("weights.npz", "data.npz"),
    "safetensors and a folder": ("weights.safetensors", "data"),
    "functions": ("model_of_the_test:weights", "model_of_the_test:batches"),
}


@pytest.mark.parametrize("form", FORMS)
def test_explain_writes_the_relevance_of_the_data(form, capsys):
    weights, data = FORMS[form]
    given = ["--weights", weights, "--data", data, "--rules", "Gamma(0.25)", "--target", "labels", "--batch", 8]
    assert relprop("explain", NETWORK, *given, "--out", "relevance.h5") == 0
    assert "relevance.h5: 20 examples, in" in capsys.readouterr().out
    expected = rp.explain(network, rp.Gamma(0.25), target=LABELS)(PARAMS, IMAGES.astype(np.float32))
    with h5py.File("relevance.h5") as file:
        np.testing.assert_allclose(file["attribution"][:], np.moveaxis(expected, -1, 1), rtol=1e-5, atol=1e-3)
        np.testing.assert_array_equal(file["label"][:], LABELS)
        assert ("index" in file) == (data == "data")
    assert relprop("explain", NETWORK, *given, "--out", "relevance.h5") == 0
    assert "20 examples, 20 of them before" in capsys.readouterr().out


TARGETS = {"top": "top", "2": 2, "output": None}


@pytest.mark.parametrize("target", TARGETS)
def test_targets_and_layouts(target):
    given = [
        "--weights",
        "weights.npz",
        "--data",
        "images.npy",
        "--rules",
        "model_of_the_test:composite",
        "--layout",
        "NCHW",
    ]
    assert relprop("explain", NETWORK, *given, "--target", target, "--out", "relevance.zarr") == 0
    expected = rp.explain(network, rp.Gamma(0.5), target=TARGETS[target])(PARAMS, IMAGES.astype(np.float32))
    found = zarr.open_group("relevance.zarr", mode="r")["attribution"][...]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_other_rules_do_not_go_on_with_a_store(capsys):
    given = ["explain", "model_of_the_test:bare", "--data", "images.npy", "--out", "relevance.h5", "--rules"]
    assert relprop(*given, "Epsilon()") == 0
    assert relprop(*given, "Gamma(0.5)") == 2
    assert "run/rules was Composite: kind('affine'): Epsilon(), is" in capsys.readouterr().err
    assert relprop(*given, "Gamma(0.5)", "--overwrite") == 0
    assert relprop(*given, "model_of_the_test:a", "--overwrite") == 0
    assert relprop(*given, "model_of_the_test:a") == 0
    assert relprop(*given, "model_of_the_test:b") == 2  # rules that differ in an array only
    assert "run/values was" in capsys.readouterr().err


def test_plan_prints_the_table(capsys):
    given = ["plan", NETWORK, "--weights", "weights.npz", "--rules", "epsilon_plus_flat"]
    assert relprop(*given, "--shape", "2,4,4,3") == 0
    printed = capsys.readouterr().out
    assert [line.split()[1:3] for line in printed.splitlines()[2:]] == [
        ["dense/kernel", "dense"],
        ["relu", "activation"],
        ["out", "dense"],
    ]
    assert "Flat()" in printed
    assert "[2, 48]" in printed
    assert relprop(*given, "--data", "data.npz", "--batch", 3, "--audit", "--target", "labels") == 0
    audited = capsys.readouterr().out
    assert "means over 3 examples" in audited
    expected = network(PARAMS, IMAGES[:3].astype(np.float32))[np.arange(3), LABELS[:3]].mean()
    assert float(audited.splitlines()[0].split("output")[1].split()[0]) == pytest.approx(float(expected), rel=1e-3)


def test_bench_counts_products_beside_the_gradient(capsys):
    given = ["bench", NETWORK, "--weights", "weights.npz", "--shape", "2,4,4,3", "--repeats", 1]
    assert relprop(*given, "--rules", "Epsilon()", "AlphaBeta(2.0, 1.0)") == 0
    about, head, *rows = capsys.readouterr().out.splitlines()
    assert "float32[2, 4, 4, 3]" in about
    assert head.split()[:2] == ["rules", "ms"]
    names = [row[:32].strip() for row in rows]
    assert names == ["gradient", "Epsilon()", "AlphaBeta(2.0, 1.0)"]
    products = [int(row[32:].split()[2]) for row in rows]
    assert products[0] == products[1] == 4  # forward and backward through two layers
    assert products[2] > products[1]


def test_products_are_counted_whoever_computes_them():
    program = """
    %a = f32[2,3]{1,0} dot(%x, %y), lhs_contracting_dims={1}
    ROOT %b = f32[1,8,8,4]{3,2,1,0} convolution(%p, %q), window={size=3x3}
    %c = f32[2,3]{1,0} custom-call(%x, %y), custom_call_target="__cublas$lt$matmul"
    %d = (f32[2], u8[0]) custom-call(%x, %y), custom_call_target="__cudnn$convForward"
    %e = f32[2,3]{1,0} custom-call(%x, %y), custom_call_target="__onednn$matmul"
    %f = f32[8,4]{1,0} dot(%x, %y), metadata={op_name="jit(network)/conv_general_dilated"}
    %g = f32[2]{0} custom-call(%x), custom_call_target="Sharding"
    %dot.4 = f32[2]{0} add(%x, %y)
    """
    assert bench.products(program) == (3, 3)  # convolutions, dots


def test_bench_needs_floats():
    with pytest.raises(rp.ArgumentError, match="one array of floats"):
        list(bench.bench(lambda x: x, {}, jnp.arange(3)))
    with pytest.raises(rp.ArgumentError, match="repeats=0"):
        list(bench.bench(lambda x: x, {}, jnp.ones(3), repeats=0))


def explain(function="model_of_the_test:bare", data="images.npy", rules="Epsilon", out="relevance.h5", *more):
    return ["explain", function, "--data", data, "--rules", rules, "--out", out, *more]


ERRORS = {
    "no module": (explain("nothing_here:fn"), "there is no module 'nothing_here' in"),
    "no colon": (explain("model_of_the_test.bare"), "is not of the form module:name"),
    "no such name": (explain("model_of_the_test:absent"), "model_of_the_test has no absent"),
    "no function": (explain("model_of_the_test:number"), "is int, not a function"),
    "no rule": (
        explain(rules="Gama(0.25)"),
        "--rules Gama(0.25): expected module:name, or one of AlphaBeta, ...epsilon_plus",
    ),
    "no call": (explain(rules="__import__('os').getcwd()"), "expected module:name, or one of"),
    "wrong arguments": (explain(rules="Gamma(gama=1)"), "unexpected keyword argument 'gama'...It is Gamma(...gamma"),
    "a computed argument": (explain(rules="Gamma(len('a'))"), "with numbers as arguments"),
    "no target": (explain("model_of_the_test:bare", "images.npy", "Epsilon", "r.h5", "--target", "first"), "--target first"),
    "no labels": (explain("model_of_the_test:bare", "images.npy", "Epsilon", "r.h5", "--target", "labels"), "have none"),
    "a class that is not there": (
        explain("model_of_the_test:bare", "images.npy", "Epsilon", "r.h5", "--target", "9"),
        "target=9 is out of range",
    ),
    "no data": (explain(data="absent.npy"), "No such file ...absent.npy"),
    "no form of data": (explain(data="weights.txt"), "expected FILE.npz, FILE.npy, a folder"),
    "too many arrays": (explain(data="weights.npz"), "has the arrays dense/kernel, out: it needs one besides label"),
    "no array": (explain(data="broken.npy"), "broken.npy cannot be read"),
    "no weights": ([*explain(), "--weights", "absent.npz"], "No such file ...absent.npz"),
    "no form of weights": ([*explain(), "--weights", "weights.txt"], "--weights weights.txt: expected FILE.npz"),
    "no suffix": (explain(out="relevance.npz"), "one of .h5, .hdf5, .zarr"),
    "relevance that is not finite": (explain("model_of_the_test:nan"), "is not finite: ...non_finite"),
    "labels for random input": (
        ["plan", "model_of_the_test:bare", "--shape", "2,4,4,3", "--rules", "Zero", "--target", "labels", "--audit"],
        "--target labels needs --data",
    ),
    "integers": (["bench", "model_of_the_test:bare", "--data", "data/label.npy", "--rules", "Zero"], "array of floats"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line_and_status_2(capsys, what):
    arguments, message = ERRORS[what]
    Path("broken.npy").write_bytes(b"no array")
    assert relprop(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("relprop: error: ")
    assert printed.count("\n") == 1
    assert all(part in printed for part in message.split("..."))


def test_a_mistake_in_the_function_is_not_hidden():
    with pytest.raises(TypeError, match="a mistake of one's own"):
        relprop(*explain("model_of_the_test:forgetful"))


def test_an_interruption_says_that_the_same_command_goes_on(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "explain_dataset", interrupted)
    assert relprop(*explain()) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_the_installed_command_shows_its_help(folder):
    environment = {**os.environ, "PYTHONPATH": str(Path(rp.__file__).parents[1]), "COLUMNS": "120"}
    shown = subprocess.run(
        [sys.executable, "-m", "relprop.command", "explain", "--help"], env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert all(part in shown.stdout for part in ("--weights", "--data", "--rules", "--out", "module:name of a function"))
    with pytest.raises(SystemExit) as left:
        relprop("explain", "model_of_the_test:bare")
    assert left.value.code == 2


def test_weights_of_a_checkpoint(folder, capsys, default_promotion):
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", PARAMS)
    assert relprop("plan", NETWORK, "--weights", "checkpoint", "--shape", "2,4,4,3", "--rules", "Zero") == 0
    assert "dense/kernel" in capsys.readouterr().out
