"""`examples/prototypes.py`: prototypes of handwritten digits in three ways, judged by a second network."""

import contextlib
import pathlib

import jax
import numpy as np
import prototypes
import pytest
from digit_models import Decoder, remembered

MNIST = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"


@contextlib.contextmanager
def as_users_run_it():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.exists(), reason=f"MNIST is not in this repository, and not at {MNIST}")
def test_prototypes_of_mnist(tmp_path, capsys):
    with as_users_run_it():
        pictures = [tmp_path / "prototypes.png", tmp_path / "samples.png"]
        arguments = ["--mnist", str(MNIST), "--out", str(pictures[0]), "--samples", str(pictures[1])]
        tables, (expert, gaussian) = prototypes.main(arguments)
    assert "right by second, of 10" in capsys.readouterr().out
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    assert expert > gaussian + 10  # nats; the error of the estimate is below one
    for table in tables.values():
        assert (table["p(class)"] > 0.99).all()
    for name in ("expert", "code"):
        assert tables[name]["right by second"].sum() >= 9
        assert tables[name]["p by second"].mean() > tables["simple"]["p by second"].mean()
        assert tables[name]["right by second"].sum() >= tables["simple"]["right by second"].sum()
    distance = {name: table["distance"].mean() for name, table in tables.items()}
    assert distance["code"] < distance["expert"] < distance["simple"]
    assert tables["expert"]["log p(x)"].mean() > tables["simple"]["log p(x)"].mean()


def test_what_was_trained_is_saved_and_loaded(tmp_path):
    with as_users_run_it():
        decoder, z = Decoder((8, 8, 1)), np.ones((2, 4), np.float32)
        make = lambda: decoder.init(jax.random.key(0), z)  # noqa: E731
        form = jax.eval_shape(make)
        made = remembered(tmp_path / "folder" / "decoder.npz", make, form)
        loaded = remembered(tmp_path / "folder" / "decoder.npz", lambda: pytest.fail("trained again"), form)
        np.testing.assert_array_equal(decoder.apply(loaded, z), decoder.apply(made, z))
        other = jax.eval_shape(lambda: Decoder((4, 4, 1)).init(jax.random.key(0), z))
        with pytest.raises(ValueError, match=r"decoder\.npz holds another model.*remove it"):
            remembered(tmp_path / "folder" / "decoder.npz", make, other)
