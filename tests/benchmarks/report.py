"""The printed table: a line for each preset, a further one for each further peer. And the machine."""

import os
import pathlib
import platform
import statistics

import jax

from .measure import ratio

COLUMNS = [  # head, width, format
    ("preset", 26, ""),
    ("ours s", 7, ".3f"),
    ("/ grad", 6, ".2f"),
    ("conv", 4, "d"),
    ("dot", 4, "d"),
    ("/ flop", 6, ".2f"),
    ("MB", 6, ".0f"),
    ("/ MB", 5, ".2f"),
    ("compile", 7, ".1f"),
    ("/ grad", 6, ".2f"),
    ("peer", 12, ""),
    ("peer s", 7, ".3f"),
    ("/ torch grad", 12, ".2f"),
    ("/ ours", 6, ".2f"),
    ("diff", 5, ".0e"),
    ("note", 0, ""),
]


class Table:
    """Lines of a table; aligned for a terminal, or `markdown`."""

    def __init__(self, markdown=False):
        self.markdown = markdown

    def head(self):
        lines = [self._line([head for head, _, _ in COLUMNS])]
        rule = [("---" if width == 0 or not form else "---:") for _, width, form in COLUMNS]
        return [*lines, self._line(rule) if self.markdown else "-" * len(lines[0])]

    def lines(self, row):
        if "error" in row:
            return [self._line([row["preset"], *[None] * (len(COLUMNS) - 2), row["error"]])]
        ours, peers = _ours(row), _peers(row) or [[None] * 6]
        peers[0][-1] = "; ".join(filter(None, [row["notes"].get("ours"), peers[0][-1]]))
        blank = [None] * len(ours)
        return [self._line((blank if index else ours) + peer) for index, peer in enumerate(peers)]

    def _line(self, cells):
        texts = []
        for value, (_, width, form) in zip(cells, COLUMNS, strict=True):
            text = "" if value is None else value if isinstance(value, str) else format(value, form)
            texts.append(text if self.markdown else f"{text:<{width}}" if not form else f"{text:>{width}}")
        return f"| {' | '.join(texts)} |" if self.markdown else "  ".join(texts).rstrip()


def _ours(row):
    seconds, relative = row["seconds"], row["relative"]
    gradient = row["preset"] == "gradient"
    return [
        row["preset"],
        statistics.median(seconds["gradient" if gradient else "ours"]),
        None if gradient else ratio(row, "ours", "gradient"),
        row["convolutions"],
        row["dots"],
        None if gradient else relative.get("flops"),
        row["memory"] / 1e6,
        None if gradient else relative.get("memory"),
        row["compilation"],
        None if gradient else relative.get("compilation"),
    ]


def _peers(row):
    """Name, seconds, ratio to torch's gradient and to our time, difference, note: of each peer."""
    found = []
    if row["preset"] == "gradient" and "torch gradient" in row["seconds"]:
        median = statistics.median(row["seconds"]["torch gradient"])
        over = ratio(row, "torch gradient", "gradient")
        found.append(["torch", median, None, over, row["diff"]["torch gradient"], None])
    for name, difference in row["diff"].items():
        if name != "torch gradient":
            median = statistics.median(row["seconds"][name])
            found.append([name, median, ratio(row, name, "torch gradient"), ratio(row, name, "ours"), difference, None])
    found += [[name, None, None, None, None, note] for name, note in row["notes"].items() if name != "ours"]
    return found


def machine():
    """What the figures depend on."""
    facts = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    try:
        import torch

        facts["torch"] = torch.__version__
    except ImportError:
        pass
    return facts


def _processor():
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
