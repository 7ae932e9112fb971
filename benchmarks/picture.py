"""Draw what `run.py` found: each contender's ratio to the reference, model by model.

Run it as `python benchmarks/picture.py FILE PICTURE`, the file written by `--json`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import of, values

COLOURS = {"ours": "#1f6fb2", "theirs": "#c8553d", "reference": "#868e96"}
TICKS = (0.5, 1, 2, 4, 8, 16, 32)


def main() -> None:
    """Draw the picture of one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(options.picture, json.loads(options.file.read_text())["results"])
    print(f"The picture is {options.picture}")


def draw(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw a panel per model and regime: medians and quartiles.

    Args:
      path: where the picture goes.
      lines: the results of `run.py`, as it saves them.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = values(lines, "contender")[1:][::-1]  # the reference itself is the line
    models, regimes = values(lines, "model"), values(lines, "regime")
    figure, axes = plt.subplots(
        len(regimes),
        len(models),
        figsize=(2.0 + 2.6 * len(models), 1.2 + 0.25 * len(names) * len(regimes)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, regime in zip(axes, regimes, strict=True):
        for panel, model in zip(row, models, strict=True):
            by_name = {x["contender"]: x for x in of(lines, model=model, regime=regime)}
            draw_panel(panel, [by_name[name] for name in names])
            panel.set_title(f"{model}, {regime}", fontsize=10)
    label_axis(axes[0, 0], names)
    figure.legend(handles=handles(), loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("time of a step ÷ time of clip_grad_norm_ (left of 1 is cheaper)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(panel: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw a stem from 1 to each median and its quartiles."""
    panel.axvline(1.0, color="black", linewidth=1.2, zorder=1)
    for place, line in enumerate(lines):
        low, middle, high = (line["ratio"][key] for key in ("low", "median", "high"))
        colour = COLOURS[line["kind"]]
        panel.plot([1, middle], [place, place], color=colour, linewidth=3, alpha=0.5)
        panel.plot([low, high], [place, place], color=colour, linewidth=1)
        panel.plot(middle, place, "o", color=colour, markersize=5)
    panel.grid(axis="x", alpha=0.25)


def label_axis(panel: Any, names: Sequence[str]) -> None:
    """Name the rows and the ratios; the panels share both."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(-0.7, len(names) - 0.3)


def handles() -> list[Any]:
    """Return what the legend shows."""
    from matplotlib.lines import Line2D

    labels = {"ours": "this library", "theirs": "others", "reference": "the same again"}
    return [
        Line2D([], [], color=COLOURS[kind], marker="o", linewidth=3, label=label)
        for kind, label in labels.items()
    ]


if __name__ == "__main__":
    main()
