"""The picture of a run: each contender's ratio to the reference, model by model."""

from collections.abc import Sequence
from pathlib import Path

from contenders import REFERENCE, SAME
from report import Case

OURS, THEIRS, NEITHER = "#2a6f97", "#b5838d", "#adb5bd"


def draw(path: Path, cases: Sequence[Case], peers: Sequence[str]) -> None:
    """Draw a panel per model and regime: medians, with quartiles as lines.

    Args:
      path: where the picture goes.
      cases: what was measured.
      peers: the contenders that are not ours; they have another colour.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    models = list(dict.fromkeys(case.model for case in cases))
    regimes = list(dict.fromkeys(case.regime for case in cases))
    names = [name for name in cases[0].results if name != REFERENCE][::-1]
    colours = [colour(name, peers) for name in names]
    figure, axes = plt.subplots(
        len(regimes),
        len(models),
        figsize=(3.2 * len(models), 0.24 * len(names) * len(regimes) + 1.5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for case in cases:
        panel = axes[regimes.index(case.regime)][models.index(case.model)]
        ratios = [case.results[name].ratio for name in names]
        middle = [ratio.median for ratio in ratios]
        spread = [
            [ratio.median - ratio.low for ratio in ratios],
            [ratio.high - ratio.median for ratio in ratios],
        ]
        panel.barh(names, middle, xerr=spread, color=colours, ecolor="#444444")
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{case.model}, {case.regime}", fontsize="medium")
        panel.tick_params(labelsize="small")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(axis="x", alpha=0.3)
    told = {"this library": OURS, "others": THEIRS, "torch itself": NEITHER}
    patches = [Patch(color=own, label=name) for name, own in told.items()]
    figure.legend(handles=patches, loc="outside lower right", ncols=3, fontsize="small")
    figure.supxlabel(f"time of a step, to {REFERENCE} on the same gradients")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def colour(name: str, peers: Sequence[str]) -> str:
    """Return the colour of a contender: ours, a peer's, or what torch has."""
    if name in peers:
        return THEIRS
    return NEITHER if name == SAME or name.startswith("one read") else OURS
