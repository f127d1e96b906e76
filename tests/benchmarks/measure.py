"""Times and counts of one network: our gradient and relevances, torch's gradient, the relevances of peers."""

import gc
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import relprop as rp
from relprop.bench import compiled, timed

TARGETS = 10  # in the row of many targets


def measure(problem, presets, repeats, torch_gradient=None, peers=None):
    """Yield a row, a dict, for the gradient, for each preset, and for many targets at once.

    `torch_gradient()` runs torch's gradient, None without torch; `peers` gives by name what a peer offers: for each preset a
    function that prepares a run of it. Runs are repeated in turns, ours and then torch's, so that those of a row see the
    same machine; hooks are in place and programs compiled before. A row has

    - `preset`, and `error` and nothing else where ours fails
    - `convolutions`, `dots`, `flops`, `memory` (bytes beside arguments and results) and `compilation` (seconds) of our
      program, and `relative`, these beside the gradient's
    - `seconds`: all of them, by run: `ours`, `gradient`, `torch gradient`, and each peer
    - `diff`: for each peer the distance of its relevance from ours in the 2-norm, relative
    - `notes`: for each peer that failed why; for ours (key `ours`) what is to be known
    """
    params, x = jax.device_put((problem.params, problem.x))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(x))  # what JAX does once is no one's compilation time
    base = compiled(_gradient(problem.fn, problem.target), params, x)
    runs = {"gradient": base.run} | ({"torch gradient": torch_gradient} if torch_gradient else {})
    values = {name: run() for name, run in runs.items()}
    row = _row("gradient", base, base, _turns(runs, repeats))
    if torch_gradient:
        row["diff"]["torch gradient"] = _distance(values["torch gradient"], values["gradient"])
    yield row
    for preset in presets:
        gc.collect()  # hooks of torch and their models refer to one another
        try:
            explained = compiled(rp.explain(problem.fn, problem.presets[preset](), target=problem.target), params, x)
            value = np.asarray(explained.run())
        except Exception as error:  # the others are of interest all the same
            yield {"preset": preset, "error": _reason(error)}
            continue
        now, diff, notes = {"ours": explained.run} | runs, {}, {}
        for name, offered in (peers or {}).items():
            if preset not in offered:
                continue
            try:
                run = offered[preset]()
                diff[name] = _distance(run(), value)
                now[name] = run
            except Exception as error:
                notes[name] = _reason(error)
        if value.size and not np.isfinite(value).all():
            notes["ours"] = "not finite"
        yield _row(preset, explained, base, _turns(now, repeats), diff, notes)
    yield _many_targets(problem, presets[0], repeats, params, x[:1])


def _many_targets(problem, preset, repeats, params, x):
    """Several targets of one example by `vmap`: one forward pass, and a backward pass for each."""

    def explain(targets, params, x):
        rules = problem.presets[preset]()
        return jax.vmap(lambda target: rp.explain(problem.fn, rules, target=target)(params, x))(targets)

    targets = np.arange(TARGETS) % problem.fn(params, x).shape[-1]
    forward = compiled(problem.fn, params, x)
    base = compiled(_gradient(problem.fn, problem.target[:1]), params, x)
    explained = compiled(explain, targets, params, x)
    runs = {"ours": explained.run, "gradient": base.run}
    [run() for run in runs.values()]
    bound = (forward.flops + TARGETS * (base.flops - forward.flops)) / base.flops
    note = f"one example; 1 forward and {TARGETS} backward passes of the gradient are {bound:.2f} flop"
    return _row(f"{preset}, {TARGETS} targets", explained, base, _turns(runs, repeats), notes={"ours": note})


def _gradient(fn, target):
    return jax.grad(lambda params, x: jnp.take_along_axis(fn(params, x), target[:, None], -1).sum(), argnums=1)


def _turns(runs, repeats):
    """The seconds of all runs: JAX's in turns, then torch's, whose threads keep cores busy for a while."""
    found = {}
    for group in (("ours", "gradient"), runs.keys() - {"ours", "gradient"}):
        chosen = {name: run for name, run in runs.items() if name in group}
        if chosen:
            found |= dict(zip(chosen, timed(list(chosen.values()), repeats), strict=True))
    return found


def _row(preset, program, base, seconds, diff=None, notes=None):
    counted = {key: getattr(program, key) for key in ("convolutions", "dots", "flops", "memory", "compilation")}
    relative = {key: counted[key] / getattr(base, key) for key in ("flops", "memory", "compilation") if getattr(base, key)}
    return {"preset": preset, **counted, "relative": relative, "seconds": seconds, "diff": diff or {}, "notes": notes or {}}


def _distance(found, value):
    value = np.asarray(value)
    return float(np.linalg.norm(found - value) / np.linalg.norm(value))


def _reason(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def ratio(row, above, below):
    """Of the medians of two runs of a row; None where one of them is missing."""
    if not row["seconds"].get(above) or not row["seconds"].get(below):
        return None
    return statistics.median(row["seconds"][above]) / statistics.median(row["seconds"][below])
