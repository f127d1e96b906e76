"""Ordered assignments of rules to layers."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .errors import ArgumentError, UnusedSelectorWarning
from .rules.base import Rule, as_rule
from .selectors import Selector, as_selector, kind
from .structure import Layer


class Composite:
    """An ordered list of (selector, rule) pairs; the first selector that matches a layer gives its rule.

    Iterates over its pairs, so that `[("add", rp.Norm()), *rp.presets.epsilon_plus()]` puts a rule before a preset.

    Example:
        >>> import relprop as rp
        >>> rp.Composite([(rp.first("conv"), rp.Flat()), ("conv", rp.ZPlus()), ("dense", rp.Epsilon())])
        Composite:
          first(kind('conv')): Flat()
          kind('conv'): ZPlus()
          kind('dense'): Epsilon()
    """

    def __init__(self, pairs: Iterable[tuple[Any, Any]] | Mapping[Any, Any]):
        pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
        self._pairs: list[tuple[Selector, Rule]] = []
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ArgumentError(f"Rules are pairs of a selector and a rule, got {pair!r}.")
            self._pairs.append((as_selector(pair[0]), as_rule(pair[1])))

    def __iter__(self) -> Iterator[tuple[Selector, Rule]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        return "\n".join(["Composite:", *(f"  {selector}: {short(rule)}" for selector, rule in self._pairs)])

    def assign(self, layers: Sequence[Layer], defaults: Mapping[str, Rule]) -> list[Rule]:
        """The rule of each layer; `defaults` by kind where no selector matches. Warns of selectors without a match."""
        table = [selector.matches(layers) for selector, _ in self._pairs]
        for (selector, rule), matched in zip(self._pairs, table, strict=True):
            if selector.required and not any(matched):
                present = ", ".join(sorted({layer.kind for layer in layers})) or "none"
                warnings.warn(
                    f"The selector {selector} of the rule {short(rule)} matched no layer. Kinds of layers here: {present}. "
                    "`relprop.plan(fn, rules)(*args)` prints them with their addresses.",
                    UnusedSelectorWarning,
                    stacklevel=2,
                )
        chosen = []
        for i, layer in enumerate(layers):
            hits = ((rule, hit) for (_, rule), hit in zip(self._pairs, table, strict=True) if hit[i])
            rule, hit = next(hits, (defaults[layer.kind], []))
            rule = rule.at(sum(hit[:i]), sum(hit))
            rule.check(layer)
            chosen.append(rule)
        return chosen


def as_composite(rules: Any) -> Composite:
    """A composite from a composite, pairs, a mapping, one rule for all affine layers, or None (the defaults)."""
    if isinstance(rules, Composite):
        return rules
    if rules is None:
        return Composite([])
    if isinstance(rules, Mapping) or (isinstance(rules, Iterable) and not isinstance(rules, str)):
        return Composite(rules)
    return Composite([(kind("affine"), as_rule(rules))])


def short(rule: Rule) -> str:
    """A rule with the hyper-parameters that differ from their defaults."""
    fields: Any = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
    shown = []
    for field in fields:
        value = getattr(rule, field.name)
        plain = isinstance(value, bool | int | float | str | tuple)
        if not (plain and value == field.default):
            name = getattr(value, "__name__", None) or (repr(value) if plain else type(value).__name__)
            shown.append(f"{field.name}={name}")
    return f"{type(rule).__name__}({', '.join(shown)})"
