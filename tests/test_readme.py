"""Every Python block of the README runs, and gives what its comments say."""

import pathlib
import re

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def registry():
    from relprop.registry import REGISTERED

    yield
    REGISTERED.clear()


def test_the_blocks_run_one_after_another(default_promotion, registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one block writes a file
    names = {}
    with jax.enable_x64(False):
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
            shape = re.search(r"\(params, .*\)  # (\(.*\))$", block, re.MULTILINE)
            if shape:
                assert names["relevance"].shape == eval(shape[1])
        assert names["every_class"].shape == (3, 5, 4)
        assert names["sweep"].shape == (7, 5, 4)
        by_class = [line for block in BLOCKS for line in block.splitlines() if line.startswith("rp.explain(")]
        assert len(by_class) == 2
        for line in by_class:
            call, comment = line.rsplit("#", 1)
            np.testing.assert_allclose(eval(call, names), eval(comment), atol=1e-3)


def test_every_file_has_its_line():
    listed = set(re.findall(r"`((?:relprop|examples)/[\w/]+\.py)`", README))
    present = {str(p.relative_to(ROOT)) for folder in ("relprop", "examples") for p in (ROOT / folder).rglob("*.py")}
    assert present - listed == {"relprop/rules/__init__.py", "relprop/concepts/__init__.py"}
    assert listed <= present
