"""Draws what the suite found, for the README."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import where
from works import METRICS, MORE_IS_BETTER, OURS

# What a reader compares first; others are in the tables.
_PANELS = ("echo-50", "echo-500", "echo-16k", "framed", "connect", "broadcast")

_OURS_COLOUR = "#1f6f54"
_PEER_COLOUR = "#b8bec6"
_FLOOR_COLOUR = "#e4e7eb"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw bars for each work that there is, to *path* (.svg or .png)."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same bars give the same file.
    mpl.rcParams["svg.hashsalt"] = "trioreactor"
    # Text as text, which is a tenth of the file.
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    works = {name: work for name, work in results["works"].items() if work["servers"]}
    panels = [works[name] for name in _PANELS if name in works]
    if not panels:
        panels = list(works.values())[: len(_PANELS)]
    if not panels:
        print("no chart: nothing was measured", file=sys.stderr)
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len(panel["servers"]) for panel in panels)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6 * columns, rows * (0.8 + 0.21 * most)), squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        metric = panel["metric"]
        bars = sorted(
            ((server[metric], name) for name, server in panel["servers"].items()),
            reverse=metric not in MORE_IS_BETTER,
        )
        names = [name for _, name in bars]
        values = [value for value, _ in bars]
        colours = [
            _OURS_COLOUR if name in OURS else _FLOOR_COLOUR if "epoll" in name else _PEER_COLOUR
            for name in names
        ]
        drawn = ax.barh(names, values, color=colours)
        ax.bar_label(drawn, [f"{value:,.1f}" for value in values], padding=3, fontsize=7)
        title = textwrap.fill(panel["title"], 48)
        ax.set_title(f"{title}\n{METRICS[metric]}", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.12)
    figure.text(
        0.01,
        0.003,
        f"{where(results['machine'])}; medians of {results['rounds']} interleaved rounds",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
