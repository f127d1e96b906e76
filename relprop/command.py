"""The command line: `relprop explain`, `relprop plan`, `relprop bench`."""

import argparse
import ast
import importlib
import inspect
import os
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import presets
from .audit import audit
from .bench import bench, table
from .composite import Composite, as_composite
from .dataset import Batches, explain_dataset, fingerprint
from .errors import ArgumentError, RelpropError
from .loader import Loader
from .progress import require
from .rules.base import Graded, RelevanceRule, Rule
from .transform import plan, value_and_explain

DESCRIPTION = """\
Explain JAX functions by layer-wise relevance propagation.

  relprop explain  write the relevance of a dataset to HDF5 or zarr; interrupted, the same command goes on
  relprop plan     print which rule holds at which layer, or where relevance goes (--audit)
  relprop bench    print what rules cost beside the gradient

FUNCTION is module:name of a function (params, x) of a batch, found from the working folder; without --weights, of x."""

SOURCES = """\
weights   FILE.npz or FILE.safetensors (names with / become nested dictionaries), a folder of an orbax checkpoint, or
          module:name of a function that returns them
data      FILE.npz or a folder of .npy files with the arrays label and index, both optional, and one more, the input;
          FILE.npy with the input alone; or module:name of a function that returns batches. Bytes become float32
rules     a preset or rule, such as epsilon_plus_flat or 'Gamma(0.25)', or module:name of rules or of a function that
          returns them
target    top (the predicted class), labels (those of the data), output (as it stands), or the number of a class"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 after an error, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(argv)
    sys.path.insert(0, os.getcwd())
    try:
        options.run(options)
    except (RelpropError, OSError, ImportError) as error:
        print(f"relprop: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("relprop: interrupted; what was stored is safe, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("relprop", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=SOURCES)
        added.formatter_class = raw
        added.set_defaults(run=run)
        added.add_argument("function", metavar="FUNCTION", help="module:name")
        added.add_argument("--weights", metavar="SOURCE", help="the first argument of the function")
        added.add_argument("--target", default="top", help="what is explained; top by default")
        added.add_argument("--batch", type=_positive, default=64, metavar="N", help="examples at a time; 64 by default")
        return added

    added = command("explain", _explain, "write the relevance of a dataset to HDF5 or zarr")
    added.add_argument("--data", metavar="SOURCE", required=True)
    added.add_argument("--rules", required=True)
    added.add_argument("--out", metavar="FILE", type=Path, required=True, help="ends in .h5, .hdf5 or .zarr")
    added.add_argument("--layout", choices=("NHWC", "NCHW"), help="of the input, if it has four axes; NHWC by default")
    added.add_argument("--non-finite", choices=("raise", "warn"), default="raise", help="stop at NaN, or warn at the end")
    added.add_argument("--overwrite", action="store_true", help="delete what --out holds, and begin anew")

    for name, run, text in (
        ("plan", _plan, "print which rule holds at which layer"),
        ("bench", _bench, "print what rules cost beside the gradient"),
    ):
        added = command(name, run, text)
        given = added.add_mutually_exclusive_group(required=True)
        given.add_argument("--data", metavar="SOURCE", help="its first batch is used")
        given.add_argument("--shape", type=_shape, metavar="N,H,W,C", help="of random normal input, with the batch")
    for name, changes in (("plan", {}), ("bench", {"nargs": "+"})):
        commands.choices[name].add_argument("--rules", required=True, **changes)
    commands.choices["plan"].add_argument("--audit", action="store_true", help="measure where relevance goes")
    commands.choices["bench"].add_argument("--repeats", type=_positive, default=5, help="timed runs; 5 by default")
    return parser


def _explain(options: argparse.Namespace) -> None:
    fn, args, batches = _function(options.function), _weights(options.weights), _data(options.data, options.batch)
    rules, target = _rules(options.rules), _target(options.target)
    labels = target == "labels"

    def explained(*given):
        *before, x, label = given if labels else (*given, target)
        return value_and_explain(fn, rules, target=label)(*before, _pixels(x))

    composite = as_composite(rules)
    # Arrays among their hyper-parameters are not in the text.
    values = fingerprint([vars(rule) for _, rule in composite])
    run = {"function": options.function, "rules": repr(composite), "values": values, "target": options.target}
    found = explain_dataset(
        explained,
        batches,
        options.out,
        args=args,
        labels=labels,
        run=run,
        layout=options.layout,
        non_finite=options.non_finite,
        overwrite=options.overwrite,
    )
    before = f", {found.resumed} of them before" if found.resumed else ""
    print(f"{found.path}: {found.examples} examples{before}, in {found.seconds:.1f} s")


def _plan(options: argparse.Namespace) -> None:
    fn, args, rules = _function(options.function), _weights(options.weights), _rules(options.rules)
    x, target = _sample(options)
    print(audit(fn, rules, target=target, batched=True)(*args, x) if options.audit else plan(fn, rules)(*args, x))


def _bench(options: argparse.Namespace) -> None:
    fn, args = _function(options.function), _weights(options.weights)
    rules = {text: _rules(text) for text in options.rules}
    x, target = _sample(options)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, x {x.dtype}{list(x.shape)}")
    for line in table(bench(fn, rules, *args, x, target=target, repeats=options.repeats)):
        print(line, flush=True)


def _sample(options: argparse.Namespace) -> tuple[Any, Any]:
    """One batch of input, and the target for it."""
    target = _target(options.target)
    if options.shape is not None:
        if target == "labels":
            raise ArgumentError("--target labels needs --data; random input of --shape has no labels.")
        return jax.random.normal(jax.random.key(0), options.shape, jnp.float32), target
    first = Loader(_data(options.data, options.batch)).first
    if target == "labels" and first.label is None:
        raise ArgumentError(f"--target labels: {options.data} has no labels.")
    return _pixels(jax.tree.map(jnp.asarray, first.x)), jnp.asarray(first.label) if target == "labels" else target


def _pixels(x: Any) -> Any:
    """Bytes are pixels, which carry relevance as floats; larger integers are tokens."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.uint8 else leaf, x)


def _load(text: str) -> Any:
    """The object that module:name says."""
    module, _, name = text.partition(":")
    if not module or not name:
        raise ArgumentError(f"{text!r} is not of the form module:name.")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0] and not module.startswith(f"{error.name}."):
            raise  # something that the module imports
        raise ArgumentError(f"{text!r}: there is no module {module!r} in {os.getcwd()} or among those installed.") from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"{text!r}: the module {module} has no {name}.")
        found = getattr(found, part)
    return found


def _function(text: str) -> Any:
    found = _load(text)
    if not callable(found):
        raise ArgumentError(f"{text!r} is {type(found).__name__}, not a function.")
    return found


def _weights(text: str | None) -> tuple[Any, ...]:
    """The arguments before the input: none, or one pytree."""
    if text is None:
        return ()
    if ":" in text and not os.path.exists(text):
        return (_function(text)(),)
    path = Path(text)
    if path.suffix == ".npz":
        with _read(path) as arrays:
            return (_nested(dict(arrays)),)
    if path.suffix == ".safetensors":
        safetensors = require("safetensors", "reading such weights", "dataset")
        try:
            return (_nested(importlib.import_module("safetensors.numpy").load_file(path)),)
        except safetensors.SafetensorError as error:
            raise ArgumentError(f"{path} cannot be read: {error}") from None
    if path.is_dir():
        require("orbax", "reading a folder of weights", "dataset")
        return (importlib.import_module("orbax.checkpoint").StandardCheckpointer().restore(path.absolute()),)
    raise ArgumentError(f"--weights {text}: expected FILE.npz, FILE.safetensors, the folder of a checkpoint or module:name.")


def _nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Names with slashes as dictionaries of dictionaries."""
    found: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = array
    return found


def _data(text: str, size: int) -> Iterable[Any]:
    """Batches of at most `size` examples."""
    if ":" in text and not os.path.exists(text):
        return _function(text)()
    path = Path(text)
    if path.suffix == ".npy":
        return Batches(_read(path, "r"), size=size)
    if path.is_dir():
        arrays = {file.stem: _read(file, "r") for file in sorted(path.glob("*.npy"))}
    elif path.suffix == ".npz":
        with _read(path) as given:
            arrays = dict(given)
    else:
        raise ArgumentError(f"--data {text}: expected FILE.npz, FILE.npy, a folder of .npy files or module:name.")
    inputs = [name for name in arrays if name not in ("label", "index")]
    if len(inputs) != 1:
        raise ArgumentError(
            f"--data {text} has the arrays {', '.join(arrays) or '(none)'}: it needs one besides label and index."
        )
    return Batches(arrays[inputs[0]], arrays.get("label"), arrays.get("index"), size=size)


def _read(path: Path, mode: Any = None) -> Any:
    try:
        return np.load(path, mmap_mode=mode)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ArgumentError(f"{path} cannot be read: {error}") from None


def _rules(text: str) -> Any:
    """Rules of a name, a call with literal arguments, or module:name."""
    if ":" in text:
        found = _load(text)
        return found() if callable(found) and not isinstance(found, Rule | Composite) else found
    known = _known()
    try:
        node: Any = ast.parse(text, mode="eval").body
        called = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(called.func, ast.Name) or called.func.id not in known:
            raise ValueError
        given = [ast.literal_eval(value) for value in called.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in called.keywords}
    except (SyntaxError, ValueError):
        raise ArgumentError(
            f"--rules {text}: expected module:name, or one of {', '.join(sorted(known))}, with numbers as arguments."
        ) from None
    make = known[called.func.id]
    try:
        return make(*given, **named)
    except TypeError as error:
        raise ArgumentError(f"--rules {text}: {error}. It is {called.func.id}{inspect.signature(make)}.") from None


def _known() -> dict[str, Any]:
    """Presets and rules by their names."""
    found: dict[str, Any] = {n: f for n, f in vars(presets).items() if getattr(f, "__module__", None) == presets.__name__}
    package = importlib.import_module(__package__)
    public = {name: getattr(package, name) for name in package.__all__}
    rules = {name: kind for name, kind in public.items() if inspect.isclass(kind) and issubclass(kind, Rule)}
    abstract = (Rule, RelevanceRule, Graded)
    return {name: make for name, make in (found | rules).items() if not name.startswith("_") and make not in abstract}


def _target(text: str) -> Any:
    if text in ("top", "labels"):
        return text
    if text == "output":
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(f"--target {text}: expected top, labels, output or the number of a class.") from None


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


if __name__ == "__main__":
    sys.exit(main())
