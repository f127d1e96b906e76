"""The account that `relprop.audit` gives: a pytree of lines that prints as a table, and can be checked for losses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ArgumentError, RelevanceLossError
from .tables import table

_ADVICE = {
    "bias": "biases keep their share of a layer; bias='distribute' on the rule spreads it over the inputs, bias='ignore' "
    "takes them out of the denominator, and `argnums` can ask for their relevance",
    "epsilon": "the stabiliser damps what a layer hands on; use a smaller epsilon",
    "f(0)": "the activation is not 0 at 0, and that part depends on no input",
    "softmax": "the derivative of a softmax does not conserve relevance (AttnLRP); presets.cp_lrp() holds it constant",
    "frozen": "a value that is not explained stands beside explained ones; explain it too with `argnums`",
    "fallback": "the derivative was used where no rule is known; relprop.register gives the primitive a linearisation",
    "condition": "a condition takes relevance out here, as asked for",
    "rule": "the rule itself does not conserve here; choose another one for this layer",
}
CAUSES = tuple(_ADVICE)


@dataclasses.dataclass(frozen=True)
class Line:
    """One layer of an audit, or one plain equation (with index -1).

    All numbers are relevance, in the units of the explained output, but for the last two. They are scalars; with leading
    axes for a batch, and then one for each loop around if the audit was made by step.

    Attributes:
        index, address, kind, rule, source: as in a plan.
        steps: the lengths of the loops, if the audit was made by step.
        relevance_out: what reaches the layer's output.
        relevance_in: what the layer hands to its inputs.
        absorbed: by cause, what it keeps: `relevance_out = relevance_in + sum(absorbed)`.
        largest: the largest absolute coefficient that it hands on.
        non_finite: how many elements of the relevance that it hands on are NaN or infinite.
    """

    index: int
    address: str
    kind: str
    rule: str
    source: str
    steps: tuple[int, ...]
    relevance_out: Any
    relevance_in: Any
    absorbed: dict[str, Any]
    largest: Any
    non_finite: Any

    @property
    def lost(self) -> Any:
        """All that the layer keeps, by whatever cause."""
        return sum(self.absorbed.values())

    def summed(self) -> "Line":
        """The line of all steps together."""
        if not self.steps:
            return self
        steps = tuple(range(-len(self.steps), 0))
        return dataclasses.replace(
            jax.tree.map(lambda value: value.sum(steps), self), steps=(), largest=self.largest.max(steps, initial=0)
        )

    @property
    def name(self) -> str:
        """The layer as messages name it."""
        where = f" {self.address}" if self.address != "-" else ""
        return f"{self.kind}{where} at {self.source}" + (f" under {self.rule}" if self.rule else "")


@dataclasses.dataclass(frozen=True)
class Audit:
    """Where the relevance of an output goes. Prints as a table, sorted by what is lost; a pytree of arrays.

    Attributes:
        lines: a `Line` for each layer, and for each plain equation that may keep relevance, in order of execution.
        output: the relevance of what is explained.
        inputs: the relevance that arrives, by the name of the explained array.
        parameters: the relevance of explained parameters, which the account leaves out: biases receive what they absorb,
            weights what passes them.
    """

    lines: tuple[Line, ...]
    output: Any
    inputs: dict[str, Any]
    parameters: dict[str, Any]

    @property
    def absorbed(self) -> dict[str, Any]:
        """What layers keep, by cause, summed over layers and steps."""
        zero = jnp.zeros_like(self.output)
        return {cause: sum((line.absorbed[cause] for line in self.summed().lines), start=zero) for cause in CAUSES}

    @property
    def unaccounted(self) -> Any:
        """The relevance of the output, less that of the inputs, less what layers keep: 0 up to rounding."""
        return self.output - sum(self.inputs.values()) - sum(self.absorbed.values())

    def summed(self) -> "Audit":
        """The same, with the steps of loops summed."""
        return dataclasses.replace(self, lines=tuple(line.summed() for line in self.lines))

    def __iter__(self):
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def _is_known(self) -> bool:
        leaves = jax.tree.leaves(self)
        return all(isinstance(v, jax.Array | np.ndarray | np.generic) and not isinstance(v, jax.core.Tracer) for v in leaves)

    def _must_be_known(self):
        if not self._is_known:
            raise ArgumentError(
                "The values of this audit are not known yet: it was made under jit, vmap or another transformation. Return "
                "it from there, without strict=True, and call `check()` or `rows()` on what comes back."
            )

    def check(self, tolerance: float = 0.01, ignore: tuple[str, ...] = ()) -> None:
        """Raise an error if a layer keeps more than a share `tolerance` of the output's relevance, or hands on NaN.

        Args:
            tolerance: relative to the relevance of the output; in a batch for each example, in loops for each step that
                is kept apart.
            ignore: causes that do not count, such as `("bias",)`.

        Raises:
            RelevanceLossError: names the layer that loses most, its cause and what can be done.
        """
        self._must_be_known()
        if not set(ignore) <= set(CAUSES):
            raise ArgumentError(f"ignore={ignore}: causes are {', '.join(CAUSES)}.")
        if not np.isfinite(np.asarray(self.output)).all():
            raise RelevanceLossError("The explained output is itself not finite: look at the input and the parameters.")
        for line in reversed(self.lines):  # the first that relevance meets on its way
            if np.any(np.asarray(line.non_finite) > 0):
                count = int(np.asarray(line.non_finite).sum())
                raise RelevanceLossError(
                    f"The layer {line.name} hands on relevance that is not finite ({count} elements). A denominator close "
                    "to 0 needs a larger epsilon; a rule or linearisation of your own may divide by 0."
                )
        worst, where = 0.0, None
        for line in self.lines:
            kept = sum(np.abs(np.asarray(v, np.float64)) for cause, v in line.absorbed.items() if cause not in ignore)
            scale = np.abs(np.asarray(self.output, np.float64))
            scale = np.reshape(scale, scale.shape + (1,) * (np.ndim(kept) - scale.ndim))
            shares = kept / np.where(scale == 0, 1, scale)
            if shares.size and shares.max() > max(worst, tolerance):
                worst, where = float(shares.max()), (line, np.unravel_index(shares.argmax(), shares.shape))
        if where is None:
            return
        line, place = where
        causes = {c: float(np.asarray(v)[place]) for c, v in line.absorbed.items() if c not in ignore}
        most = max(causes, key=lambda cause: abs(causes[cause]))
        example = f" (index {', '.join(map(str, place))})" if place else ""
        parts = ", ".join(f"{c} {v:.4g}" for c, v in causes.items() if abs(v) >= 1e-3 * abs(causes[most]))
        raise RelevanceLossError(
            f"The layer {line.name} keeps {worst:.1%} of the output's relevance{example}, more than {tolerance:.1%}: "
            f"{parts}. {_ADVICE[most][0].upper()}{_ADVICE[most][1:]}."
        )

    def rows(self) -> list[dict[str, Any]]:
        """The lines as flat dictionaries of numbers and strings, one for each example and each step that is kept apart."""
        self._must_be_known()
        found = []
        for line in self.lines:
            arrays = {
                "out": line.relevance_out,
                "in": line.relevance_in,
                "lost": line.lost,
                **{f"kept: {cause}": value for cause, value in line.absorbed.items()},
                "largest": line.largest,
                "non_finite": line.non_finite,
            }
            arrays = {name: np.asarray(value) for name, value in arrays.items()}
            for place in np.ndindex(arrays["out"].shape):
                batch, steps = place[: len(place) - len(line.steps)], place[len(place) - len(line.steps) :]
                found.append(
                    {"index": line.index, "address": line.address, "kind": line.kind, "rule": line.rule}
                    | ({"example": batch[0] if len(batch) == 1 else batch} if batch else {})
                    | ({"step": steps[0] if len(steps) == 1 else steps} if steps else {})
                    | {name: value[place].item() for name, value in arrays.items()}
                    | {"source": line.source}
                )
        return found

    def to_frame(self) -> Any:
        """The `rows` as a `pandas.DataFrame`; needs pandas.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError('Audit.to_frame needs pandas: pip install "relprop[frame]". `rows()` does not.') from error
        return pandas.DataFrame(self.rows())

    def __repr__(self) -> str:
        if not self._is_known:
            return f"Audit of {len(self.lines)} lines, traced: its numbers are known once the function has run."
        return _text(self)


jax.tree_util.register_dataclass(
    Line,
    data_fields=["relevance_out", "relevance_in", "absorbed", "largest", "non_finite"],
    meta_fields=["index", "address", "kind", "rule", "source", "steps"],
)
jax.tree_util.register_dataclass(Audit, data_fields=["lines", "output", "inputs", "parameters"], meta_fields=[])


def _text(audit: Audit) -> str:
    """The sums, and a table of the layers by what they lose; means over the examples of a batch."""
    audit = jax.tree.map(lambda value: np.asarray(value, np.float64), audit.summed())
    if audit.output.size == 0:
        return f"Audit of {len(audit.lines)} lines and 0 examples."
    batched = audit.output.ndim > 0
    sizes = [np.abs(v).mean() for v in (audit.output, *(line.relevance_out for line in audit.lines))]
    scale = max((size for size in sizes if np.isfinite(size)), default=0.0)
    visible = 1e-6 * scale  # below is rounding

    def number(value, digits=4) -> str:
        return f"{0.0 if abs(value.mean()) <= visible else value.mean():.{digits}g}"

    def seen(value) -> bool:
        return not np.abs(value).max(initial=0) <= visible

    def rank(line) -> float:
        lost = np.abs(line.lost)
        return 0.0 if not seen(lost) else float(lost.mean()) if np.isfinite(lost).all() else float(np.inf)

    summary = [("relevance of the output", number(audit.output, 5))]
    summary += [(f"  arrives at {name}", number(value, 5)) for name, value in audit.inputs.items()]
    summary += [(f"  kept: {cause}", number(value, 5)) for cause, value in audit.absorbed.items() if seen(value)]
    summary += [("  unaccounted", f"{np.mean(audit.unaccounted):.2g}")]
    width = max(len(label) for label, _ in summary)
    lines = [f"{label:<{width}}  {value:>11}" for label, value in summary]
    if batched:
        lines[0] += f"   (means over {audit.output.size} examples; layers by the mean of |lost|)"

    shown = sorted((line for line in audit.lines if line.index >= 0 or seen(line.lost)), key=rank, reverse=True)
    causes = [c for c in CAUSES if any(seen(line.absorbed[c]) for line in shown)]
    broken = any(line.non_finite.any() for line in shown)
    head = ["#", "address", "kind", "rule", "out", "in", "lost", "of output"]
    head += [*(["worst [example]"] if batched else []), *causes, "largest c", *(["not finite"] if broken else []), "source"]
    rows = [head]
    for line in shown:
        row = ["-" if line.index < 0 else str(line.index), line.address, line.kind, line.rule]
        row += [number(value) for value in (line.relevance_out, line.relevance_in, line.lost)]
        row.append(_share(line.lost.mean(), audit.output.mean()))
        if batched:
            worst = int(np.abs(line.lost).argmax())
            row.append(f"{number(line.lost.ravel()[worst])} [{worst}]" if seen(line.lost) else "")
        row += [number(line.absorbed[c], 3) for c in causes]
        row += [f"{line.largest.max(initial=0):.3g}", *([f"{line.non_finite.sum():.0f}"] if broken else [])]
        rows.append([*row, line.source.rpartition("/")[2]])
    return "\n".join([*lines, "", table(rows, right=range(4, len(head) - 1))])


def _share(lost: float, output: float) -> str:
    return f"{lost / output:.1%}" if output and np.isfinite(lost / output) else "-"
