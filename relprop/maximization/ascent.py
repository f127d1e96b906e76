"""Activation maximisation: the input that a function of it likes best, found by gradient steps of an optax optimiser.

Maximised is, over the code of a parametrisation,

    objective(transform(x)) + log_prior(x) + parametrisation.log_prior(code)    with    x = parametrisation.decode(code)

One compiled loop makes a chunk of steps for all items and restarts at once; between chunks the host looks at the result, and
nothing leaves the device before. Under `jit`, `vmap` and other transformations there is one chunk and no host.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..errors import ArgumentError, StoppedWarning
from ..jaxprs import hoisted
from ..progress import bar
from .parametrisations import as_parametrisation, prior_of, projection_of, total

__all__ = ["ForEach", "Maximum", "maximize"]

ADAM = optax.adam(0.05)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Maximum:
    """What `maximize` found. A pytree; with `each` every array has a leading axis for the items.

    Attributes:
        input: x, decoded from the code.
        code: what was optimised.
        value: the objective at the input, without transforms.
        log_prior: the sum of the priors of input and code there.
        trajectory: (steps,) the objective before each step, of the transformed input; NaN after a stop.
        scores: (steps,) what is maximised: trajectory plus priors.
        steps: how many steps were made. Fewer than asked for if the run was interrupted, a callback ended it, or a value
            was not finite.
        finite: whether all values were. If not, input and code are the last for which they were.
    """

    input: Any
    code: Any
    value: jax.Array
    log_prior: jax.Array
    trajectory: jax.Array
    scores: jax.Array
    steps: jax.Array
    finite: jax.Array


@dataclasses.dataclass(frozen=True)
class ForEach:
    """What differs from item to item of `maximize(each=...)`: `make(item)` is used in its place.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> near = rp.maximization.ForEach(lambda c: rp.maximization.L2(1.0, c))
        >>> centres = jnp.array([1.0, 2.0])
        >>> rp.maximize(lambda x, c: 2.0 * x, jnp.zeros(()), log_prior=near, each=centres).input.round(2)
        Array([2., 3.], dtype=float32)
    """

    make: Callable[[Any], Any]


class _State(NamedTuple):
    """What is carried through the loop.

    `code` is what `step` steps led to; `kept`, after `kept_step` steps (-1 for a start that was not looked at yet), the
    last one where what is maximised was finite. `alive` is false after a step that was not.
    """

    code: Any
    kept: Any
    optimizer: Any
    key: jax.Array
    step: jax.Array
    kept_step: jax.Array
    alive: jax.Array


def maximize(
    objective: Callable[..., Any],
    parametrisation: Any,
    optimizer: Any = ADAM,
    steps: int = 500,
    *,
    key: Any = None,
    log_prior: Any = None,
    transforms: Any = (),
    projection: Any = None,
    callback: Callable[[Maximum], Any] | None = None,
    each: Any = None,
    restarts: int = 1,
    chunk: int = 50,
    progress: bool | None = None,
) -> Maximum:
    """Find an input that maximises an objective: the prototype of a class, what a neuron or a direction likes.

    `jit` and `vmap` apply (over classes, keys, hyper-parameters of priors and optimiser): then nothing is shown or
    interrupted. To compile once and call often, put a call under `jax.jit`; what the objective closes over (weights) is
    handed to the compiled loop as arguments.

    Args:
        objective: a function of the input that returns a real scalar: a logit, a log-probability, a neuron, a direction in a
            layer, a difference of classes, minus a loss. With `each` a function (x, item).
        parametrisation: what is optimised: `Pixel`, `Fourier`, `Maco`, `Code`, `Several` of `relprop.maximization`, or any
            object with functions init(key) and decode(code). A pytree of arrays stands for itself: the input to start from.
        optimizer: an optax transformation, by default `optax.adam(0.05)`. Gradients are those of a loss, which is minus what
            is maximised. One that needs values (`optax.lbfgs`) gets them.
        steps: how many.
        key: for the start, the transforms and the restarts; `jax.random.key(0)` by default. Same key, same result.
        log_prior: a function of the input that returns a log-density up to a constant, or a sequence of functions, which are
            added: `L2`, `TotalVariation`, `Gaussian`, `GaussianRBM`, `Diversity`. It sees the input without transforms.
            One that returns several numbers counts with their sum.
        transforms: functions (key, x) -> x, applied one after another before the objective with a new key at each step.
        projection: a function of the code, applied at the start and after each step, such as
            `lambda x: optax.projections.projection_box(x, 0.0, 1.0)`.
        callback: called with a `Maximum` after each chunk, outside of the compiled loop; what is true ends the run.
        each: a pytree of arrays with a common first axis, the items: everything is done for each of them at once, by `vmap`,
            with the same key. `ForEach` makes parametrisation, priors, optimiser, transforms, projection depend on the item.
        restarts: how many starts, from different keys; that of the highest score at its end is returned.
        chunk: at most how many steps are made before the host looks: to show progress, call back, or stop.
        progress: show a bar (extra `maximization`); by default where standard error is a terminal.

    Returns:
        A `Maximum`. An interrupt (Ctrl-C) between chunks returns what there is, with a `StoppedWarning`.

    Raises:
        ArgumentError: the objective is not scalar, or something else does not have the form that is said here.

    Warns:
        StoppedWarning: a value or a step was not finite: the run stops there, and returns the last state before. (Other
            items and restarts go on. Under transformations nothing is said: look at `finite`.)

    Source:
        Erhan et al. 2009; Montavon, Samek, Müller: Methods for interpreting and understanding deep neural networks, 2018,
        section 3.

    Example:
        >>> import jax.numpy as jnp, optax, relprop as rp
        >>> peak = jnp.array([1.0, -2.0])
        >>> found = rp.maximize(lambda x: -jnp.sum((x - peak) ** 2), jnp.zeros(2), optax.sgd(0.1), steps=100)
        >>> found.input.round(3)
        Array([ 1., -2.], dtype=float32)
        >>> w = jnp.array([[3.0, -1.0], [-2.0, 4.0]])  # what do two linear units like best in a box?
        >>> box = lambda x: optax.projections.projection_box(x, -1.0, 1.0)
        >>> rp.maximize(lambda x, i: w[i] @ x, jnp.zeros(2), projection=box, each=jnp.arange(2)).input
        Array([[ 1., -1.],
               [-1.,  1.]], dtype=float32)
    """
    for name, number, least in (("steps", steps, 1), ("restarts", restarts, 1), ("chunk", chunk, 1)):
        if not isinstance(number, int | np.integer) or number < least:
            raise ArgumentError(f"{name}={number!r} has to be an integer, {least} at least.")
    key = jax.random.key(0) if key is None else key
    if isinstance(key, int | np.integer):
        raise ArgumentError(f"key={key} is a number: make a key of it, jax.random.key({key}).")
    count = _count(each)
    problem = functools.partial(
        _Problem,
        objective,
        parametrisation,
        optimizer,
        _several(log_prior),
        _several(transforms),
        projection,
        each is not None,
    )
    if callback is not None and not callable(callback):
        raise ArgumentError(f"callback={callback!r} is not a function of a Maximum.")
    problem(_first(each)).check(key)
    lanes = _Lanes(problem, each, count, restarts)
    state = lanes.start(key)

    # Chunks of one length, so that there is one program: the steps beyond the last are not made.
    size = math.ceil(steps / math.ceil(steps / chunk))
    advance, captured = hoisted(lambda state, each: lanes.advance(state, each, steps, size), state, each)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((captured, state, each))):
        if callback is not None or progress:
            raise ArgumentError(
                "A callback and a progress bar need values, but `maximize` is called under a transformation (jit, vmap, "
                "grad): leave them out; `each` does many at once with both."
            )
        state, traces = lanes.advance(state, each, steps, steps)
        return lanes.best(lanes.ends(state, each), traces)

    ends, captured_by_ends = hoisted(lanes.ends, state, each)
    compiled, compiled_ends = jax.jit(advance), jax.jit(ends)
    pieces: list[Any] = []

    def so_far() -> tuple[Maximum, Maximum]:
        """The results of all runs, without trajectories, and of those the best."""
        made = int(np.max(np.asarray(state.step) + ~np.asarray(state.alive)))
        traces = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1)[..., :made], *pieces)
        runs = compiled_ends(captured_by_ends, state, each)
        return runs, lanes.best(runs, traces)

    reasons = []
    with bar(progress, "maximize", steps, "steps", "maximization") as show:
        try:
            for begun in range(0, steps, size):
                state, traces = jax.block_until_ready(compiled(captured, state, each))
                pieces.append(traces)
                show(min(size, steps - begun))
                if not bool(jnp.any(state.alive)) or (callback is not None and _wants_an_end(callback(so_far()[1]))):
                    break
        except KeyboardInterrupt:
            if not pieces:
                raise
            reasons.append(f"interrupted after {int(jnp.max(state.step))} of {steps} steps; what there is is returned.")
    runs, best = so_far()
    if not bool(jnp.all(runs.finite)):
        reasons.append(lanes.told(runs, best))
    if reasons:
        warnings.warn(f"maximize: {' '.join(reasons)}", StoppedWarning, stacklevel=2)
    return best


class _Problem:
    """What is maximised for one item."""

    def __init__(self, objective, parametrisation, optimizer, log_priors, transforms, projection, takes_item, item):
        def made(thing):
            if isinstance(thing, ForEach):
                if not takes_item:
                    raise ArgumentError("ForEach stands for what differs between items: give the items, each=...")
                return thing.make(item)
            return thing

        self.objective = (lambda x: objective(x, item)) if takes_item else objective
        self.besides = f" and the item {_shapes(item)}" if takes_item else ""
        self.parametrisation = as_parametrisation(made(parametrisation))
        self.optimizer = made(optimizer)
        if not (hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")):
            raise ArgumentError(f"optimizer={self.optimizer!r} has to be an optax transformation, such as optax.adam(0.05).")
        self.optimizer = optax.with_extra_args_support(self.optimizer)
        self.log_priors = [made(prior) for prior in log_priors]
        self.transforms = [made(transform) for transform in transforms]
        self.projection = made(projection)
        functions = {"objective": [objective], "log_prior": self.log_priors, "transforms": self.transforms}
        functions["projection"] = [] if self.projection is None else [self.projection]
        for name, given in functions.items():
            for function in given:
                if not callable(function):
                    raise ArgumentError(f"{name}: {function!r} is not a function.")

    def check(self, key) -> None:
        """Errors for what does not have the right form, before anything runs."""
        code = self.called("init of the parametrisation", self.parametrisation.init, key)
        for leaf in jax.tree.leaves(code):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ArgumentError(f"The code is {_shapes(code)}, but has to be real floating-point arrays.")
        again = self.called("projection", self.allowed, code)
        if jax.tree.map(_form, again) != jax.tree.map(_form, code):
            raise ArgumentError(f"The projection makes {_shapes(again)} of a code {_shapes(code)}: it has to keep its form.")
        x = seen = self.called("decode of the parametrisation", self.parametrisation.decode, code)
        for transform in self.transforms:
            seen = self.called("transform", transform, key, seen)
        for prior in self.log_priors:
            self.called("log_prior", lambda x, prior=prior: total(prior(x)), x)
        value = self.called("objective", self.objective, seen, note=self.besides)
        if not isinstance(value, jax.ShapeDtypeStruct) or value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ArgumentError(
                f"The objective returns {_shapes(value)}, but has to return one real number, float[]: pick an element such "
                f"as `fn(x)[0, 3]`, or take a sum. Its input is {_shapes(seen)}."
            )
        if jax.tree.map(_form, x) != jax.tree.map(_form, seen):
            note = f"{self.besides}: the value that is returned is without transforms, so it has to take that, too"
            self.called("objective", self.objective, x, note=note)

    def called(self, name: str, function, *args, note: str = ""):
        """The form of what a function returns; its errors say what it was called with."""
        try:
            return jax.eval_shape(function, *args)
        except Exception as error:
            error.add_note(f"relprop.maximize called the {name} with {_shapes(args[-1])}{note}.")
            raise

    def allowed(self, code):
        code = projection_of(self.parametrisation, code)
        return code if self.projection is None else self.projection(code)

    def start(self, key):
        return self.allowed(self.parametrisation.init(key))

    def prior(self, x, code, dtype):
        """The sum of all priors of input and code, in the dtype of the objective."""
        parts = [prior_of(self.parametrisation, code), *(prior(x) for prior in self.log_priors)]
        return jnp.stack([total(part).astype(dtype) for part in parts]).sum()

    def loss(self, code, key):
        """Minus what is maximised; and the objective, as the transformed input has it."""
        x = self.parametrisation.decode(code)
        seen = x
        for i, transform in enumerate(self.transforms):
            seen = transform(jax.random.fold_in(key, i), seen)
        value = self.objective(seen)
        return -(value + self.prior(x, code, value.dtype)), value

    def step(self, state: _State, steps: int):
        """One step, if it is one of `steps` and all before were finite; and the objective and the score before it."""
        key = jax.random.fold_in(state.key, state.step)
        (loss, value), slope = jax.value_and_grad(self.loss, has_aux=True)(state.code, key)
        # Optimisers of optax mix integers and widths: they are written for the standard promotion.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, memory = self.optimizer.update(
                slope, state.optimizer, state.code, value=loss, grad=slope, value_fn=lambda code: self.loss(code, key)[0]
            )
            code = optax.apply_updates(state.code, updates)
        code = self.allowed(code)
        running = state.alive & (state.step < steps)
        finite = running & jnp.isfinite(loss)
        moved = finite & jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(code)]).all()
        # NaN after a stop; turns beyond the last step are cut off.
        nothing = _where(state.alive, jnp.zeros_like(value), jnp.full_like(value, jnp.nan))
        trace = jnp.where(running, value, nothing), jnp.where(running, -loss, nothing)
        return _State(
            code=_where(moved, code, state.code),
            kept=_where(finite, state.code, state.kept),
            optimizer=_where(moved, memory, state.optimizer),
            key=state.key,
            step=_where(moved, state.step + 1, state.step),
            kept_step=_where(finite, state.step, state.kept_step),
            alive=moved | (state.alive & ~running),
        ), trace

    def end(self, state: _State) -> Maximum:
        """The result, still without its trajectory."""

        def at(code):
            x = self.parametrisation.decode(code)
            value = self.objective(x)
            return x, code, value, self.prior(x, code, value.dtype)

        last, kept = at(state.code), at(state.kept)
        finite = state.alive & jnp.isfinite(last[2] + last[3])
        x, code, value, prior = _where(finite, last, kept)
        nothing = jnp.zeros(0, value.dtype)
        return Maximum(x, code, value, prior, nothing, nothing, _where(finite, state.step, state.kept_step), finite)


class _Lanes:
    """All items and restarts of a problem at once: a leading axis for items, if there are any, then one for restarts.

    Where there is one restart it has no axis, so that functions that know no `vmap` can be maximised.
    """

    def __init__(self, problem, each, count: int | None, restarts: int):
        self.problem, self.each, self.restarts = problem, each, restarts
        self.axes = (() if count is None else (count,)) + (() if restarts == 1 else (restarts,))

    def start(self, key):
        def one(key, item):
            problem = self.problem(item)
            first, later = jax.random.split(key)
            code = problem.start(first)
            step = jnp.zeros((), jnp.int32)
            return _State(code, code, problem.optimizer.init(code), later, step, step - 1, jnp.ones((), bool))

        keys = key if self.restarts == 1 else jax.random.split(key, self.restarts)
        restarted = one if self.restarts == 1 else jax.vmap(one, (0, None))
        return (restarted if self.each is None else jax.vmap(restarted, (None, 0)))(keys, self.each)

    def over(self, one):
        """`one(item, *arrays)` for all items and restarts, as a function `(each, *arrays)`."""

        def restarted(item, *arrays):
            for_item = functools.partial(one, item)
            return (for_item if self.restarts == 1 else jax.vmap(for_item))(*arrays)

        return restarted if self.each is None else jax.vmap(restarted)

    def advance(self, state, each, steps: int, size: int):
        """The state after `size` more turns of the loop, and objectives and scores (..., size) on the way."""

        def one(item, state):
            problem = self.problem(item)
            return jax.lax.scan(lambda state, _: problem.step(state, steps), state, length=size)

        return self.over(one)(each, state)

    def ends(self, state, each) -> Maximum:
        return self.over(lambda item, state: self.problem(item).end(state))(each, state)

    def best(self, runs: Maximum, traces) -> Maximum:
        """With trajectories; and of all restarts of an item the best."""
        runs = dataclasses.replace(
            runs,
            trajectory=traces[0],
            scores=traces[1],
            steps=_where(runs.steps < 0, jnp.zeros_like(runs.steps), runs.steps),
        )
        if self.restarts == 1:
            return runs
        # Those that stopped count only where all of them did.
        score = runs.value + runs.log_prior
        counts = ~jnp.isnan(score) & (runs.finite | ~runs.finite.any(-1, keepdims=True))
        best = jnp.argmax(jnp.where(counts, score, jnp.full_like(score, -jnp.inf)), -1)

        def pick(leaf, best):
            return leaf[best]

        return jax.tree.map(lambda leaf: (pick if self.each is None else jax.vmap(pick))(leaf, best), runs)

    def told(self, runs: Maximum, best: Maximum) -> str:
        """What happened where values were not finite."""
        stopped = np.argwhere(~np.asarray(runs.finite))
        step = int(runs.steps[tuple(stopped[0])]) + 1
        place = ""
        if self.axes:
            names = (["item"] if self.each is not None else []) + (["restart"] if self.restarts > 1 else [])
            named = ", ".join(f"{name} {i}" for name, i in zip(names, stopped[0], strict=True))
            place = f" ({len(stopped)} of {math.prod(self.axes)} runs, the first is {named})"
        others = bool(jnp.all(best.finite))
        returned = "Another restart is returned" if others else "The last finite state is returned"
        when = f"at step {step}" if step else "at the start"
        return (
            f"the objective, a prior or their gradient is not finite {when}{place}. {returned}: look at the objective "
            "there, or take smaller steps (a smaller learning rate, optax.clip_by_global_norm)."
        )


def _where(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _wants_an_end(answer: Any) -> bool:
    """Whether a callback returned something true; an array has to be one value."""
    if np.size(answer) != 1:
        raise ArgumentError(f"The callback returned {_shapes(answer)}: to end the run or not has to be one truth value.")
    return bool(answer)


def _several(given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    return tuple(given) if isinstance(given, Sequence) else (given,)


def _count(each: Any) -> int | None:
    """How many items there are; None without items."""
    if each is None:
        return None
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(each)}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        shapes = jax.tree.map(jnp.shape, each)
        raise ArgumentError(
            f"each has to hold arrays with a common first axis, one item at least; their shapes are {shapes}."
        )
    return lengths.pop()[0]


def _first(each: Any) -> Any:
    return None if each is None else jax.tree.map(lambda leaf: leaf[0], each)


def _form(leaf: Any) -> tuple[Any, ...]:
    return jnp.shape(leaf), jnp.result_type(leaf)


def _shapes(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", tree)).replace("'", "")
