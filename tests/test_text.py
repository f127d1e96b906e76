"""Coloured text, by what a terminal and a browser make of it."""

import builtins
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest

from relprop.errors import ArgumentError
from relprop.text import html, terminal, words

RED, WHITE, BLUE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 255), (0, 0, 0)
CUBE = (0, 95, 135, 175, 215, 255)  # the levels of the colours 16 to 231 of xterm
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # one emoji out of three, by zero width joiners
PERSIAN = "\u0645\u06cc\u200c\u062e\u0648"  # with a zero width non-joiner, as Persian is spelt


@pytest.fixture(autouse=True)
def coloured(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)


def runs(drawn):
    """(text, letters, background) of what `terminal` gives, None for a colour that is the terminal's own."""
    found, letters, back = [], None, None
    for text, code in re.findall(r"([^\x1b]+)|\x1b\[([\d;]*)m", drawn):
        if text:
            found.append((text, letters, back))
        elif code == "0":
            letters = back = None
        elif code != "1":
            letters, back = map(cube, re.fullmatch(r"38;5;(\d+);48;5;(\d+)", code).groups())
    return found


def cube(number):
    assert 16 <= int(number) <= 231, "below 16 the colours are the user's"
    red, rest = divmod(int(number) - 16, 36)
    return CUBE[red], CUBE[rest // 6], CUBE[rest % 6]


def plain(drawn):
    return "".join(text for text, _, _ in runs(drawn))


class Document(HTMLParser):
    """The tokens (text, title, letters, background), the scale and the paragraphs of what `html` gives."""

    def __init__(self, document):
        super().__init__()
        self.tags, self.tokens, self.scale, self.paragraphs = [], [], [], []
        self.title, self.open = "", []
        self.feed(document)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag == "meta":
            return
        self.open.append(tag)
        if tag == "p":
            self.paragraphs.append("")
        if tag == "span":
            back, letters = re.fullmatch(r"background:#(\w{6});color:#(\w{6})", attrs["style"]).groups()
            into = self.tokens if "title" in attrs else self.scale
            into.append(("", attrs.get("title"), tuple(bytes.fromhex(letters)), tuple(bytes.fromhex(back))))
            self.into = into

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "p" in self.open:
            self.paragraphs[-1] += data
        if self.open and self.open[-1] == "title":
            self.title += data
        if self.open and self.open[-1] == "span":
            text, *rest = self.into[-1]
            self.into[-1] = (text + data, *rest)


def contrast(a, b):
    """WCAG 2's ratio of two colours."""

    def luminance(colour):
        share = np.array(colour) / 255
        return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


def test_positive_is_red_negative_blue_and_zero_white():
    tokens, relevance = ["for", "against", "none"], jnp.array([3.0, -3.0, 0.0])
    assert [back for text, _, back in runs(terminal(tokens, relevance)) if text in tokens] == [RED, BLUE, WHITE]
    assert [back for _, _, _, back in Document(html(tokens, relevance)).tokens] == [RED, BLUE, WHITE]


def test_half_of_the_limit_has_half_of_the_colour():
    relevance = np.array([1.0, 0.5, -0.5])
    assert [t[3] for t in Document(html(list("abc"), relevance)).tokens] == [RED, (255, 128, 128), (128, 128, 255)]
    drawn = runs(terminal(list("abc"), relevance))
    assert [back for text, _, back in drawn if text in ("b", "c")] == [(255, 135, 135), (135, 135, 255)]


def test_letters_can_be_read_on_every_background():
    relevance = np.linspace(-1, 1, 511)
    tokens = ["x"] * 511
    in_terminal = [(letters, back) for text, letters, back in runs(terminal(tokens, relevance)) if text == "x"]
    in_html = [(letters, back) for _, _, letters, back in Document(html(tokens, relevance)).tokens]
    assert len(in_terminal) == len(in_html) == 511
    assert {letters for letters, _ in in_terminal + in_html} == {BLACK, WHITE}
    assert min(contrast(*pair) for pair in in_terminal + in_html) >= 4.5


def test_the_scale_goes_from_blue_to_red_between_its_numbers():
    drawn = terminal(["a", "b"], np.array([0.25, -2.0])).splitlines()[-1]
    scale = [(text, back) for text, _, back in runs(drawn) if back]
    assert plain(drawn) == "against -2           0           +2 for"
    assert (scale[0][1], scale[-1][1]) == (BLUE, RED)
    assert ("0", WHITE) in scale
    document = Document(html(["a", "b"], np.array([0.25, -2.0])))
    assert document.paragraphs[-1] == "against -2           0           +2 for"
    assert [document.scale[i][3] for i in (0, 10, 20)] == [BLUE, WHITE, RED]
    assert document.scale[10][0] == "0"


def ends(drawn):
    return re.findall(r"against (.*?) +0 +(.*?) for", drawn)


def test_own_shared_and_given_limits():
    texts, relevance = [["a", "b"], ["c"]], [np.array([1.0, 0.0]), np.array([-4.0])]
    for limit, scales, backs in [
        ("own", [("-1", "+1"), ("-4", "+4")], [RED, WHITE, BLUE]),
        ("shared", [("-4", "+4")], [(255, 191, 191), WHITE, BLUE]),
        (8.0, [("-8", "+8")], [(255, 223, 223), WHITE, (128, 128, 255)]),
    ]:
        document = Document(html(texts, relevance, limit=limit))
        assert ends("\n".join(document.paragraphs)) == scales
        assert [back for _, _, _, back in document.tokens] == backs
        assert ends(plain(terminal(texts, relevance, limit=limit))) == scales


def test_relevance_beyond_a_given_limit_is_full_and_the_scale_says_so():
    document = Document(html(["a", "b"], np.array([3.0, -1.0]), limit=2))
    assert document.tokens[0][3] == RED
    assert ends(document.paragraphs[-1]) == [("-2", ">= +2")]
    assert ends(plain(terminal(["a", "b"], np.array([3.0, -3.0]), limit=2))) == [("<= -2", ">= +2")]
    assert "against &lt;= -2" in html(["a", "b"], np.array([3.0, -3.0]), limit=2)


@pytest.mark.parametrize("limit", ["own", "shared", 1.0])
def test_relevance_of_zero_throughout_is_white(limit):
    document = Document(html(["a", "b"], jnp.zeros(2), limit=limit))
    assert [back for _, _, _, back in document.tokens] == [WHITE, WHITE]
    assert ends(document.paragraphs[-1]) == [("-1", "+1")]


def test_several_texts_may_be_rows_of_one_array_and_have_titles():
    texts = [["a", "b"], ("c", "d")]
    drawn = terminal(texts, jnp.ones((2, 2)), titles=["first", "second"], limit="shared")
    assert plain(drawn).splitlines()[:-1] == ["first", "a b", "", "second", "c d"]
    assert "\x1b[1mfirst\x1b[0m" in drawn
    document = Document(html(texts, jnp.ones((2, 2)), titles=["first", "second"], limit="shared"))
    assert document.paragraphs[:-1] == ["first", "a b", "second", "c d"]
    one = Document(html(np.array(["a", "b"]), jnp.ones(2), titles="Why <b>?"))
    assert (one.title, one.paragraphs[0]) == ("Why <b>?", "Why <b>?")
    assert document.title == Document(html(["a"], jnp.ones(1))).title == "Relevance"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_type(dtype):
    relevance = jnp.array([1.0, -2.0], dtype)
    for array in (relevance, np.asarray(relevance)):
        assert [t[1] for t in Document(html(["a", "b"], array)).tokens] == ["+1", "-2"]


def test_numbers_stand_behind_their_tokens():
    tokens, relevance = ["a", "b", "c\n", "d"], np.array([0.12345, -0.0, -1e-7, 1234.5])
    shown = "a(+0.123) b(0) c\\n(-1e-07)\nd(+1.23e+03)"
    assert plain(terminal(tokens, relevance, numbers=True)).startswith(shown)
    assert Document(html(tokens, relevance, numbers=True)).paragraphs[0] == re.sub("[()]", "", shown)
    assert [t[1] for t in Document(html(tokens, relevance)).tokens] == ["+0.123", "0", "-1e-07", "+1.23e+03"]


@pytest.mark.parametrize(
    ("tokens", "line"),
    [
        (["not", "good"], "not good"),
        (["not", " go", "od", "."], "not good."),
        (["not ", "good"], "not good"),
        (["not", " ", "good"], "not good"),
        (["if", ":", "\n", "    ", " x"], "if:\\n\n     x"),
        (["a", "\n", "b"], "a \\n\nb"),
        (["a", "\r\n\n", "b"], "a \\r\\n\n\\n\nb"),
        (["play", "##ing"], "play ##ing"),
        (["a", "", "b"], 'a "" b'),
        (["我", "喜欢"], "我 喜欢"),
        (["שלום", " עולם"], "שלום עולם"),
        ([PERSIAN, FAMILY], f"{PERSIAN} {FAMILY}"),
    ],
)
def test_tokens_with_spaces_of_their_own_run_on_and_others_are_joined(tokens, line):
    relevance = np.ones(len(tokens))
    assert plain(terminal(tokens, relevance)).rsplit("\n", 1)[0] == line
    document = Document(html(tokens, relevance))
    assert document.paragraphs[0] == line
    assert ("p", {"dir": "auto"}) in document.tags


def test_spaces_around_a_token_have_no_colour_but_a_token_of_spaces_has():
    document = Document(html([" a", "  ", "b "], np.ones(3)))
    assert [t[0] for t in document.tokens] == ["a", "  ", "b"]
    first = terminal([" a", "  ", "b "], np.ones(3)).splitlines()[0]
    assert [(text, back) for text, _, back in runs(first)] == [(" ", None), ("a", RED), ("  ", RED), ("b", RED), (" ", None)]


HARMLESS = [
    ("\x1b[31mred", "\\x1b[31mred"),
    ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
    ("\x9b2J", "\\x9b2J"),
    ("back\b\b\r", "back\\x08\\x08\\r"),
    ("tab\t.", "tab\\t."),
    ("\x00", "\\x00"),
    ("\u202eabc\u2066", "\\u202eabc\\u2066"),
    ("\u2028", "\\u2028"),
    ("\U000e0041", "\\U000e0041"),
    ("\ud800", "\\ud800"),
    ("[bold]x[/bold] :smile: [/]", "[bold]x[/bold] :smile: [/]"),
    ("[link=http://x]", "[link=http://x]"),
    ("<script>alert('1')</script>", "<script>alert('1')</script>"),
    ('"><img src=x onerror="y">&amp;', '"><img src=x onerror="y">&amp;'),
    ("</style></title>--><!--", "</style></title>--><!--"),
    ("{title} {0} %s", "{title} {0} %s"),
]


@pytest.mark.parametrize(("token", "shown"), HARMLESS)
def test_what_would_act_is_written_out(token, shown):
    drawn = terminal([token, "x"], np.ones(2), titles=token, width=200)
    assert plain(drawn).splitlines()[:2] == [shown, f"{shown} x"]
    assert {text for text, _, back in runs(drawn.splitlines()[1]) if back} == {shown, "x"}
    assert not re.search(r"[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e]|\x1b(?!\[[\d;]*m)", drawn)
    drawn.encode()

    document = html([token, "x"], np.ones(2), titles=token)
    read = Document(document)
    assert (read.title, read.paragraphs[0], read.tokens[0][0]) == (shown, shown, shown)
    tags = {tag for tag, _ in read.tags}
    assert tags == {"html", "head", "meta", "title", "body", "style", "div", "p", "b", "span"}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", document)
    document.encode()


def test_the_document_needs_nothing_else_and_leaves_a_surrounding_page_alone():
    document = html(["a"], np.ones(1))
    assert document.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|url\(|@import|<(script|link|img|iframe|object)|\b(src|href)=", document)
    style = re.search(r"<style>(.*)</style>", document, re.DOTALL)[1]
    selectors = [rule.split("{")[0].strip() for rule in style.split("}")[:-1]]
    assert selectors
    assert all(selector.startswith(".relprop") for selector in selectors)
    assert "background: #ffffff; color: #000000" in style


@pytest.mark.parametrize("width", [2, 20, 80])
def test_lines_are_wrapped_to_the_width(width):
    from rich.cells import cell_len

    tokens = ["one", " two", "三四五六七八九十", FAMILY, " long" * 30, "x" * 50]
    lines = plain(terminal(tokens, np.ones(6), numbers=True, width=width)).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert re.sub(r"\s", "", "".join(tokens)) in re.sub(r"\s|\(\+1\)", "", "".join(lines))


def test_without_a_terminal_the_string_is_the_same():
    code = "import numpy as np, relprop.text as t; print(ascii(t.terminal(['a', 'b'], np.array([1., -1.]), width=80)))"
    expected = ascii(terminal(["a", "b"], np.array([1.0, -1.0]), width=80)) + "\n"
    for term in ("dumb", "xterm"):
        environment = {"TERM": term, "JAX_PLATFORMS": "cpu"}
        piped = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert piped.stdout == expected


def test_in_a_notebook_the_string_is_the_same_and_nothing_is_displayed(monkeypatch, capsys):
    expected = terminal(["a"], np.ones(1), width=80)
    shell = type("ZMQInteractiveShell", (), {})()  # by which rich knows a notebook
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    assert terminal(["a"], np.ones(1), width=80) == expected
    assert capsys.readouterr() == ("", "")


def test_no_color_leaves_numbers_in_the_place_of_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    drawn = terminal(["a", "b"], np.array([1.0, -0.5]))
    assert "\x1b" not in drawn
    assert drawn.splitlines()[0] == "a(+1) b(-0.5)"


def test_rich_is_imported_only_to_colour_a_terminal():
    code = (
        "import sys, numpy as np, relprop.text as text\n"
        "text.html(*text.words(['a', '##b'], np.ones(2)))\n"
        "assert 'rich' not in sys.modules\n"
        "text.terminal(['a'], np.ones(1))\n"
        "assert 'rich' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_rich_the_error_says_how_to_get_it(monkeypatch):
    for module in ("rich", "rich.console", "rich.text"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "relprop\[text\]"'):
        terminal(["a"], jnp.ones(1))


@pytest.mark.parametrize(
    ("tokens", "merged", "pieces"),
    [
        ("[CLS] un ##believ ##able ! [SEP]".split(), ["[CLS]", "unbelievable", "!", "[SEP]"], [1, 3, 1, 1]),
        ("##ing form ##s".split(), ["ing", "forms"], [1, 2]),
        ("no pieces ## here".split(), ["no", "pieces", "##", "here"], [1, 1, 1, 1]),
        ("<s> ▁un believ able ▁ film </s> x".split(), ["<s>", " unbelievable", " film", "</s>", "x"], [1, 3, 2, 1, 1]),
        ("▁The ▁▁▁ ▁cat .".split(), ["The", "   ", " cat."], [1, 1, 2]),
        ("▁Title ▁## ### x".split(), ["Title", " #####x"], [1, 3]),
        (["▁"], [" "], [1]),
        (
            "The Ġun able Ċ def ĠĠĠ Ġx <|end|>".split(),
            ["The", " unable", "\n", "def", "   ", " x", "<|end|>"],
            [1, 2] + [1] * 5,
        ),
        (["The", " un", "able", "\n", "x", " ", "y"], ["The", " unable", "\n", "x", " y"], [1, 2, 1, 1, 2]),
        (["The ", "un", "able ", "end"], ["The ", "unable ", "end"], [1, 2, 1]),
    ],
)
def test_pieces_of_a_word_are_merged_and_their_relevance_summed(tokens, merged, pieces):
    relevance = 2.0 ** np.arange(len(tokens))
    found, summed = words(tokens, jnp.asarray(relevance))
    assert found == merged
    starts = np.cumsum([0, *pieces])
    np.testing.assert_array_equal(summed, [relevance[a:b].sum() for a, b in pairwise(starts)])


def test_words_of_several_texts_can_be_drawn_at_once():
    texts = [["▁the", "▁c", "at"], ["sat"]]  # the second is too short to show how its words start
    found, summed = words(texts, [jnp.array([1.0, 2.0, 3.0]), jnp.array([-1.0])])
    assert found == [["the", " cat"], ["sat"]]
    assert plain(terminal(found, summed, numbers=True, limit="shared")).splitlines()[:3] == [
        "the(+1) cat(+5)",
        "",
        "sat(-1)",
    ]


def test_words_are_summed_in_float64():
    _, summed = words(["a", "##b", "##c"], jnp.array([256.0, 1.0, 1.0], jnp.bfloat16))
    np.testing.assert_array_equal(summed, [258.0])


def test_the_marker_can_be_said():
    assert words(["un", "able"], np.ones(2))[0] == ["un", "able"]
    assert words(["un", "able"], np.ones(2), marker="▁")[0] == ["unable"]
    assert words(["Ġorġ", "jgħid"], np.ones(2), marker="##")[0] == ["Ġorġ", "jgħid"]
    with pytest.raises(ValueError, match="marker='@@' has to be one of '▁', 'Ġ', ' ', '##'"):
        words(["un@@", "able"], np.ones(2), marker="@@")


AB, ONES = ["a", "b"], np.ones(2)


@pytest.mark.parametrize("draw", [terminal, html, words])
@pytest.mark.parametrize(
    ("tokens", "relevance", "message"),
    [
        ("a b", ONES, r"tokens is the string 'a b', .* as \['a', 'b'\]"),
        ([], ONES, "tokens is empty"),
        (["ab", []], [ONES, ONES], r"tokens has to hold strings, but holds \[\]"),
        ([AB, []], [ONES, ONES], r"tokens\[1\] is empty"),
        ([AB, "ab"], [ONES, ONES], r"tokens\[1\] is the string 'ab'"),
        ([1, 2], ONES, "holds 1 of type int. Turn ids or bytes into strings"),
        ([b"a", b"b"], ONES, "holds b'a' of type bytes"),
        (np.ones((2, 2), int), np.ones((2, 2)), r"tokens\[0\] has to hold strings"),
        ([AB, AB], [ONES], "holds 2 texts, so relevance has to hold 2 arrays, not 1"),
        ([AB, AB], np.float64(1), "2 arrays, not 0"),
        (AB, np.ones(3), r"relevance has shape \(3,\), but has to be \(2,\).* relevance\[:len\(tokens\)\]"),
        (AB, np.ones((2, 8)), r"shape \(2, 8\).* relevance.sum\(-1\)"),
        (AB, 1.0, r"shape \(\)"),
        ([AB, AB], [ONES, np.ones(1)], r"relevance\[1\] has shape \(1,\)"),
        (AB, np.ones(2, int), "real floating-point numbers, but has dtype int64"),
        (AB, np.ones(2, complex), "dtype complex128"),
        (AB, jnp.array([0.0, jnp.nan]), "1 of its 2 elements are nan or infinite, the first is nan at index 1"),
        ([AB, AB], np.array([[0, 0], [np.inf, -np.inf]]), r"relevance\[1\] is not finite: 2 of its 2 .* inf at index 0"),
    ],
)
def test_errors_say_what_is_expected(draw, tokens, relevance, message):
    with pytest.raises(ArgumentError, match=message):
        draw(tokens, relevance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": "each"}, 'has to be "own", "shared" or a positive number'),
        ({"limit": 0.0}, "positive number"),
        ({"limit": jnp.nan}, "positive number"),
        ({"titles": ["a"]}, "a string for one text"),
        ({"tokens": [AB, AB], "relevance": [ONES, ONES], "titles": "ab"}, "has to be 2 strings"),
        ({"tokens": [AB, AB], "relevance": [ONES, ONES], "titles": ["a"]}, "has to be 2 strings"),
    ],
)
def test_errors_of_how_to_draw(arguments, message):
    for draw in (terminal, html):
        with pytest.raises(ArgumentError, match=message):
            draw(**{"tokens": AB, "relevance": ONES} | arguments)


def test_a_line_holds_at_least_one_wide_character():
    with pytest.raises(ArgumentError, match="width=1 has to be at least 2 columns"):
        terminal(AB, ONES, width=1)
