"""What rules cost beside the gradient of the same function: time, products, memory, compilation."""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .arguments import seeds
from .errors import ArgumentError
from .transform import explain


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one compiled function costs.

    Attributes:
        name: of the rules; "gradient" for the gradient.
        seconds: the median of the runs.
        relative: `seconds` beside the gradient's: the median of the ratios of runs in turns.
        products: dots and convolutions in the compiled program, the body of a loop once.
        flops: operations, by XLA's count; NaN where it does not say.
        memory: bytes that the program needs beside its arguments and results.
        compilation: seconds to trace and compile.
    """

    name: str
    seconds: float
    relative: float
    products: int
    flops: float
    memory: int
    compilation: float


def bench(
    fn: Callable[..., Any], rules: Mapping[str, Any], *args: Any, target: Any = "top", repeats: int = 5
) -> Iterator[Cost]:
    """Yield the cost of the gradient by the last argument of `fn`, and then of its relevance under each of the `rules`.

    The gradient is that of the explained output, its class per example held. Both are compiled, and run in turns, so that
    the ratio suffers less from a busy machine. The last argument has to be one array of floats.

    Example:
        >>> import jax.numpy as jnp, relprop as rp
        >>> from relprop.bench import bench
        >>> costs = bench(lambda w, x: x @ w, {"epsilon": rp.Epsilon()}, jnp.ones((3, 2)), jnp.ones((4, 3)), repeats=1)
        >>> [cost.name for cost in costs]
        ['gradient', 'epsilon']
    """
    *before, x = jax.device_put(args)
    if repeats < 1:
        raise ArgumentError(f"repeats={repeats}: at least one run is timed.")
    if not isinstance(x, jax.Array) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ArgumentError("bench compares with the gradient by the last argument, which has to be one array of floats.")

    def gradient(*args):
        y, pullback = jax.vjp(lambda x: fn(*args[:-1], x) if not callable(target) else target(fn(*args[:-1], x)), args[-1])
        return pullback(jax.tree.unflatten(jax.tree.structure(y), seeds(jax.tree.leaves(y), target)))[0]

    base = compiled(gradient, *before, x)
    base.run()
    yield _cost("gradient", timed([base.run], repeats)[0], 1.0, base)
    for name, rule in rules.items():
        explained = compiled(explain(fn, rule, target=target), *before, x)
        explained.run()
        ours, theirs = timed([explained.run, base.run], repeats)
        yield _cost(name, ours, statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), explained)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function at its arguments, `run()`, and what is known of it without running.

    Attributes:
        convolutions, dots: products in the program, the body of a loop once: see `products`.
        flops, memory, compilation: as in `Cost`.
    """

    run: Callable[[], Any]
    convolutions: int
    dots: int
    flops: float
    memory: int
    compilation: float


def compiled(fn: Callable[..., Any], *args: Any) -> Compiled:
    """Compile `fn` for `args`; `run` waits for the result."""
    begun = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    seconds = time.perf_counter() - begun
    analysis = program.memory_analysis()
    flops = (program.cost_analysis() or {}).get("flops", float("nan"))
    memory = analysis.temp_size_in_bytes if analysis else 0
    return Compiled(
        lambda: jax.block_until_ready(program(*args)), *products(program.as_text() or ""), flops, memory, seconds
    )


def products(program: str) -> tuple[int, int]:
    """The convolutions and dots of a compiled program; libraries for them are called by custom calls.

    A convolution that XLA computes as a dot (1x1, on a CPU) is a convolution, as in the function that was compiled.
    """
    convolutions = dots = 0
    for line in program.splitlines():
        opcode = re.search(r" (convolution|dot|custom-call)\(", line)
        called = re.search(r'custom_call_target="[^"]*(conv|dot|matmul|gemm)', line)
        if opcode is None or (opcode[1] == "custom-call" and called is None):
            continue
        kind = called[1] if called else opcode[1]
        if kind.startswith("conv") or "conv_general_dilated" in line:
            convolutions += 1
        else:
            dots += 1
    return convolutions, dots


def timed(runs: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """The seconds of every run, in turns."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, seconds, strict=True):
            begun = time.perf_counter()
            run()
            found.append(time.perf_counter() - begun)
    return seconds


def _cost(name: str, seconds: list[float], relative: float, program: Compiled) -> Cost:
    total = program.convolutions + program.dots
    return Cost(name, statistics.median(seconds), relative, total, program.flops, program.memory, program.compilation)


def table(costs: Iterator[Cost]) -> Iterator[str]:
    """The lines of a table of costs, each as soon as it is known."""
    yield f"{'rules':<32} {'ms':>9} {'/ gradient':>10} {'products':>8} {'/ flop':>7} {'memory MB':>9} {'compile s':>9}"
    base = None
    for cost in costs:
        base = base or cost
        flops = cost.flops / base.flops if base.flops else float("nan")
        yield (
            f"{cost.name:<32} {1e3 * cost.seconds:>9.2f} {cost.relative:>10.2f} {cost.products:>8} {flops:>7.2f} "
            f"{cost.memory / 1e6:>9.1f} {cost.compilation:>9.1f}"
        )
