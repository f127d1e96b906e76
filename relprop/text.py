"""Relevance as coloured text: red speaks for the explained output, blue against it, white is zero.

`terminal` colours tokens for a terminal, `html` for a browser; `words` sums the relevance of word pieces first.
The terminal needs rich, which is imported when text is drawn and not before: ``pip install "relprop[text]"``.
"""

import io
import re
import unicodedata
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import scales
from .errors import ArgumentError

__all__ = ["html", "terminal", "words"]

Array = jax.Array | np.ndarray
Tokens = Sequence[str] | Sequence[Sequence[str]]
Relevance = Array | Sequence[Array] | Sequence[float] | Sequence[Sequence[float]]

LEGEND = [step / 10 for step in range(-10, 11)]  # the relevance that the scale shows, in units of the limit
MARKERS = ("▁", "Ġ", " ", "##")  # how a tokenizer writes where a word starts; ## is written where none starts
SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")  # <s>, <|endoftext|>, [CLS]
JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"  # emoji and Persian need them; they move no text

# No padding beside a token: the letters of an Arabic word join across tokens, and word pieces touch.
DOCUMENT = """\
<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
</head>
<body style="background:#ffffff">
<style>
.relprop {{ background: #ffffff; color: #000000; color-scheme: light; font: 1rem/1.9 sans-serif; padding: 0.5em;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
.relprop p {{ margin: 0 0 0.5em; white-space: pre-wrap; overflow-wrap: anywhere; }}
.relprop p span {{ padding: 0.15em 0; }}
.relprop sub {{ font-size: 0.65em; margin-left: 0.1em; unicode-bidi: isolate; }}
.relprop .relprop-legend {{ font-size: 0.8em; margin-bottom: 2em; }}
.relprop .relprop-legend span {{ display: inline-block; width: 0.7em; padding: 0; line-height: 1.4; text-align: center; }}
</style>
<div class="relprop">
{body}
</div>
</body>
</html>
"""


def terminal(
    tokens: Tokens,
    relevance: Relevance,
    *,
    limit: Literal["own", "shared"] | float = "own",
    titles: str | Sequence[str] | None = None,
    numbers: bool = False,
    width: int | None = None,
) -> str:
    r"""Colour tokens by their relevance with the escape sequences of a terminal.

    The 256-colour palette is used, which terminals and notebooks agree on: five tints either side of white, under
    black or white letters, whichever can be read. The string is the same whether or not it goes to a terminal.
    If the environment variable NO_COLOR is set, rich leaves the colours out, and numbers take their place.

    Tokens that begin or end with a space are text as it runs and follow one another as they are; others are
    joined by spaces. Control characters, invisible ones and those that reverse the direction of text are written
    as Python escapes them (``\x1b``), a line breaks after ``\n``, and an empty token is drawn as ``""``.

    Args:
        tokens: the strings of one text, or a sequence of such texts. Word pieces are drawn as they are; see `words`.
        relevance: one real floating-point number per token, all finite: rank 1 for one text, for several a
            sequence of such arrays or an array (texts, tokens). From embeddings, sum over the features first.
        limit: the relevance drawn in full red; minus it is full blue. ``"own"``: the largest magnitude of each
            text. ``"shared"``: the largest magnitude of all texts, so that they can be compared. A positive
            number: that value; stronger relevance is drawn in the same full red or blue.
        titles: a string for one text, a sequence of strings for several.
        numbers: write its relevance after each token, with three digits.
        width: columns in which to wrap lines; by default those of the terminal, 80 if there is none.

    Returns:
        Lines without a final newline, to be printed: each text under its title, and the scale below each text for
        ``limit="own"``, below the last otherwise.

    Raises:
        ArgumentError: if relevance is not finite or does not fit to the tokens, or an argument has no meaning.
        ImportError: if rich is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.text import terminal
        >>> drawn = terminal(["not", "good"], jnp.array([-1.0, 0.5]))
        >>> drawn.splitlines()[0]
        '\x1b[38;5;231;48;5;21mnot\x1b[0m \x1b[38;5;16;48;5;210mgood\x1b[0m'
        >>> print(drawn)  # doctest: +SKIP
    """
    rich_console, rich_text = _import_rich()
    texts, values, labels = _checked(tokens, relevance, titles)
    limits = scales.limits(limit, values)
    if width is not None and width < 2:  # in one column rich leaves out characters that take two
        raise ArgumentError(f"width={width} has to be at least 2 columns, or None for the width of the terminal.")

    console = rich_console.Console(
        file=io.StringIO(),
        width=width,
        color_system="256",
        force_terminal=True,
        force_jupyter=False,
        legacy_windows=False,
    )
    numbers = numbers or console.no_color
    for i, (text, value, label, most) in enumerate(zip(texts, values, labels, limits, strict=True)):
        if i:
            console.print()
        if label is not None:
            console.print(rich_text.Text(_visible(label), style="bold"))
        line = rich_text.Text()
        for part, r in zip(_parts(text), value, strict=True):
            line.append(part.before)
            line.append(part.shown, style=_rich_style(r / most))
            if numbers:
                line.append(f"({_number(r)})")
            line.append(part.after)
        console.print(line)
        if limit == "own" or i == len(texts) - 1:
            low, high = _ends(most, [value] if limit == "own" else values)
            legend = rich_text.Text(f"against {low} ")
            for share in LEGEND:
                legend.append(" " if share else "0", style=_rich_style(share))
            legend.append(f" {high} for")
            console.print(legend)
    return str(console.file.getvalue()).rstrip("\n")


def html(
    tokens: Tokens,
    relevance: Relevance,
    *,
    limit: Literal["own", "shared"] | float = "own",
    titles: str | Sequence[str] | None = None,
    numbers: bool = False,
) -> str:
    r"""Colour tokens by their relevance in an HTML document that needs nothing besides itself.

    The relevance of a token is shown where the pointer rests on it. The document has no script and loads nothing;
    every character of a token that means something to HTML is escaped. Styles are confined to the part drawn here,
    so that it can also stand in the page of a notebook: ``IPython.display.HTML(rp.text.html(...))``.

    Args:
        tokens: as for `terminal`, with the same meaning of spaces and the same way to write what does not print.
            Text that runs from right to left does so here.
        relevance: as for `terminal`.
        limit: as for `terminal`.
        titles: as for `terminal`.
        numbers: write its relevance after each token, with three digits.

    Returns:
        The document, to be written as UTF-8.

    Raises:
        ArgumentError: if relevance is not finite or does not fit to the tokens, or an argument has no meaning.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.text import html
        >>> document = html(["<b>", "good"], jnp.array([0.0, 0.5]), titles="Why good?")
        >>> [line for line in document.splitlines() if "good</span>" in line]
        ['<p dir="auto"><span style="background:#ffffff;color:#000000" title="0">&lt;b&gt;</span>
        <span style="background:#ff0000;color:#000000" title="+0.5">good</span></p>']
        >>> pathlib.Path("relevance.html").write_text(document, encoding="utf-8")  # doctest: +SKIP
    """
    texts, values, labels = _checked(tokens, relevance, titles)
    limits = scales.limits(limit, values)
    body = []
    for i, (text, value, label, most) in enumerate(zip(texts, values, labels, limits, strict=True)):
        if label is not None:
            body.append(f'<p dir="auto"><b>{escape(_visible(label))}</b></p>')
        spans = []
        for part, r in zip(_parts(text), value, strict=True):
            title = f'title="{_number(r)}"'
            spans.append(f'{part.before}<span style="{_css(r / most)}" {title}>{escape(part.shown)}</span>')
            spans.append(f"<sub>{_number(r)}</sub>{part.after}" if numbers else part.after)
        body.append(f'<p dir="auto">{"".join(spans)}</p>')
        if limit == "own" or i == len(texts) - 1:
            low, high = map(escape, _ends(most, [value] if limit == "own" else values))
            scale = "".join(f'<span style="{_css(share)}">{" " if share else "0"}</span>' for share in LEGEND)
            body.append(f'<p class="relprop-legend">against {low} {scale} {high} for</p>')
    heading = labels[0] if len(texts) == 1 and labels[0] else "Relevance"
    return DOCUMENT.format(title=escape(_visible(heading)), body="\n".join(body))


def words(tokens: Tokens, relevance: Relevance, *, marker: str | None = None) -> tuple[list[Any], Any]:
    r"""Merge word pieces into words, with the sum of their relevance.

    A word ends where the tokenizer says so: in sentencepiece the next token begins with ``▁`` (U+2581), in
    byte-level BPE (GPT-2) with ``Ġ``, in decoded tokens it begins or the last one ends with white space, and in
    BERT's WordPiece the next token does not begin with ``##``. ``▁`` and ``Ġ`` become spaces, ``Ċ`` a newline,
    so that `terminal` and `html` draw running text; other bytes of byte-level BPE are left as they are written.
    Tokens in the form of special ones, ``<s>`` or ``[SEP]``, stay alone.

    Args:
        tokens: as for `terminal`.
        relevance: as for `terminal`.
        marker: ``"▁"``, ``"Ġ"``, ``" "`` or ``"##"``. By default the first of these that stands where it has this
            meaning; tokens without any are words already. Say it where a text may be too short to show it.

    Returns:
        The words and their relevance in float64, for one text or for several as `tokens` has it. Their sum is
        that of `relevance`.

    Raises:
        ArgumentError: if relevance is not finite or does not fit to the tokens, or the marker is not known.

    Example:
        >>> import jax.numpy as jnp
        >>> from relprop.text import words
        >>> words(["[CLS]", "un", "##believ", "##able", "!"], jnp.array([0.0, 1.0, 0.5, -0.25, 0.125]))
        (['[CLS]', 'unbelievable', '!'], array([0.   , 1.25 , 0.125]))
        >>> words(["\u2581the", "\u2581c", "at"], jnp.array([0.5, 1.0, 2.0]))
        (['the', ' cat'], array([0.5, 3. ]))
    """
    texts, values, _ = _checked(tokens, relevance, None)
    if marker is None:
        marker = next((m for m in MARKERS if any(_has(m, token) for text in texts for token in text)), None)
    elif marker not in MARKERS:
        raise ArgumentError(f"marker={marker!r} has to be one of {', '.join(map(repr, MARKERS))}, or None to look for it.")
    merged = [_merge(text, value, marker) for text, value in zip(texts, values, strict=True)]
    if isinstance(tokens[0], str):
        return merged[0]
    return [text for text, _ in merged], [value for _, value in merged]


def _has(marker: str, token: str) -> bool:
    if marker == " ":
        return token != token.strip(" ")
    return token.startswith(marker) and (marker != "##" or len(token) > 2)


def _decoded(token: str, marker: str | None) -> str:
    """`token` with spaces for marks."""
    if SPECIAL.fullmatch(token):
        return token
    if marker == "##":
        return token[2:] if _has("##", token) else token
    if marker == "Ġ":
        return token.replace("Ġ", " ").replace("Ċ", "\n")
    return token.replace("▁", " ") if marker == "▁" else token


def _merge(text: list[str], value: np.ndarray, marker: str | None) -> tuple[list[str], np.ndarray]:
    plain = [_decoded(token, marker) for token in text]

    def goes_on(i: int) -> bool:
        if marker is None or i == 0 or SPECIAL.fullmatch(text[i]) or SPECIAL.fullmatch(text[i - 1]):
            return False
        if marker == "##":
            return _has("##", text[i])
        # Spaces alone are those in front of the next word; a newline is no part of it.
        ended = plain[i - 1][-1:].isspace() and plain[i - 1].strip(" ") != ""
        return not (ended or plain[i][:1].isspace())

    first = [i for i in range(len(text)) if not goes_on(i)]
    joined = ["".join(plain[a:b]) for a, b in pairwise([*first, len(text)])]
    if marker == "▁":  # sentencepiece puts a space in front of every text, and takes it away itself
        joined[0] = joined[0].removeprefix(" ") or " "
    return joined, np.add.reduceat(value, first)


class Part(NamedTuple):
    """How one token is drawn: `shown` has the colour, what is before and after it has none."""

    before: str
    shown: str
    after: str


def _parts(text: list[str]) -> list[Part]:
    running = any(_has(" ", token) for token in text)
    parts: list[Part] = []
    for token in text:
        core = token.strip(" ") or token  # the spaces around a token keep words apart; spaces alone are a token to show
        before, _, after = token.partition(core) if core else ("", "", "")
        if not running and parts and not parts[-1].after:
            before = " "
        shown = _visible(core) or '""'
        if shown.endswith("\n"):
            shown, after = shown[:-1], "\n" + after
        parts.append(Part(before, shown, after))
    return parts


def _visible(text: str) -> str:
    """`text` without characters that act rather than print; its lines still break."""

    def each(character: str) -> str:
        if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in JOINERS:
            return character
        return ascii(character)[1:-1] + ("\n" if character == "\n" else "")

    return "".join(map(each, text))


def _number(r: float) -> str:
    return f"{r:+.3g}" if r else "0"


def _ends(most: float, values: list[np.ndarray]) -> tuple[str, str]:
    """The numbers at the ends of the scale, which say so where stronger relevance is drawn alike."""
    low, high = min(value.min() for value in values), max(value.max() for value in values)
    return ("<= " if low < -most else "") + _number(-most), (">= " if high > most else "") + _number(most)


def _colours(share: float) -> tuple[str, str]:
    """Background and letters for relevance in units of the limit."""
    fade = round(255 * (1 - min(abs(share), 1.0)))
    red, green, blue = (255, fade, fade) if share > 0 else (fade, fade, 255)
    # The relative luminance of WCAG 2. Below 0.179 white letters have the better contrast, above it black ones; it is
    # never under 4.5, which is what WCAG asks for.
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red / 255, green / 255, blue / 255)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return f"#{red:02x}{green:02x}{blue:02x}", "#000000" if luminance > 0.179 else "#ffffff"


def _rich_style(share: float) -> str:
    back, ink = _colours(share)
    return f"{ink} on {back}"


def _css(share: float) -> str:
    back, ink = _colours(share)
    return f"background:{back};color:{ink}"


def _import_rich() -> tuple[Any, Any]:
    try:
        import rich.console
        import rich.text
    except ImportError as error:
        raise ImportError(
            'relprop.text colours a terminal with rich, which is not installed: pip install "relprop[text]"; '
            "relprop.text.html does without."
        ) from error
    return rich.console, rich.text


def _checked(
    tokens: Any, relevance: Any, titles: str | Sequence[str] | None
) -> tuple[list[list[str]], list[np.ndarray], Sequence[str | None]]:
    """Texts, relevance in float64 and titles, one of each per text."""
    if isinstance(tokens, str):
        raise ArgumentError(f"tokens is the string {tokens!r}, but has to be a sequence of strings, as {tokens.split()!r}.")
    tokens = list(tokens)
    several = bool(tokens) and not isinstance(tokens[0], str | bytes) and np.ndim(tokens[0]) > 0
    texts = [list(text) for text in tokens] if several else [tokens]
    for i, text in enumerate(texts):
        name = f"tokens[{i}]" if several else "tokens"
        if several and isinstance(tokens[i], str):
            raise ArgumentError(f"tokens[0] holds the tokens of a text, but {name} is the string {tokens[i]!r}.")
        if not text:
            raise ArgumentError(f"{name} is empty: there is nothing to draw.")
        for token in text:
            if not isinstance(token, str):
                raise ArgumentError(
                    f"{name} has to hold strings, but holds {token!r} of type {type(token).__name__}. "
                    "Turn ids or bytes into strings with the tokenizer that made them."
                )
    if several:
        count = len(relevance) if isinstance(relevance, Sequence) or np.ndim(relevance) else 0
        if count != len(texts):
            raise ArgumentError(
                f"tokens holds {len(texts)} texts, so relevance has to hold {len(texts)} arrays, not {count}."
            )
    values = [
        _numbers(each, f"relevance[{i}]" if several else "relevance", len(text))
        for i, (text, each) in enumerate(zip(texts, relevance if several else [relevance], strict=True))
    ]
    return texts, values, scales.labels(titles, len(texts), several, "text", "text") or [None] * len(texts)


def _numbers(relevance: Any, name: str, count: int) -> np.ndarray:
    values = np.asarray(relevance)
    if values.shape != (count,):
        raise ArgumentError(
            f"{name} has shape {values.shape}, but has to be {(count,)}: one number for each of {count} tokens. "
            "Features of a token are summed, relevance.sum(-1), and padding is cut off, relevance[:len(tokens)]."
        )
    # jnp's issubdtype, because numpy's does not know bfloat16
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ArgumentError(f"{name} has to be real floating-point numbers, but has dtype {values.dtype}.")
    values = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ArgumentError(
            f"{name} is not finite: {len(bad)} of its {count} elements are nan or infinite, the first is "
            f"{values[bad[0]]} at index {bad[0]}. Colours would hide that; look for where it comes from."
        )
    return values
