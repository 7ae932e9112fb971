"""The tables of what the scripts have measured: rows of text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from layout import Rows, seconds, size, spaced
from shares import SMALLEST, share_tables

Line = Mapping[str, Any]
"""One contender on one model; `timing.compare` makes it."""

ON_PAGE = {
    *("gradients", "clip_grad_norm_", "smartclip", "timm, AGC", "AGC, per unit"),
    *("NormClip", "QuantileClip, global", "QuantileClip, per parameter", "TrustClip"),
    *("1.1 × (step + read)", "clip_grad_norm_, then fused AdamW"),
    *("NormClip, attached", "QuantileClip, global, attached"),
    *("optax.clip_by_global_norm", "Fixed, global, clips", "quantile, global, clips"),
    *("quantile, per leaf, clips", "optax.adaptive_grad_clip", "AGC"),
    *("global_clipnorm=1.0", "NormClip, clips", "QuantileClip, per variable"),
}
"""The contenders in the tables of ratios and of memory; files have the others, too."""


def make_tables(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the tables of what one script saved, by the names they have in docs."""
    make = MAKERS.get(saved["script"])
    return make(saved) if make else {}


def of_run(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the ratios of some contenders: nothing clipped, then all clipped."""
    lines = saved["results"]
    models = values(lines, "model")
    rows = [["nothing clipped, all clipped", *models]]
    for name in shown(values(lines, "contender")):
        of_name = of(lines, contender=name)
        pairs = (of(of_name, model=model) for model in models)
        rows.append([name, *(", ".join(map(cell, pair)) for pair in pairs)])
    return {"ratios": rows}


def ratios(lines: Sequence[Line]) -> Rows:
    """Return the ratios of the contenders on the page, a column per model.

    Quartiles are in brackets.
    """
    models = values(lines, "model")
    rows = [["", *models]]
    for name in shown(values(lines, "contender")):
        of_name = of(lines, contender=name)
        cells = {line["model"]: with_quartiles(line) for line in of_name}
        rows.append([name, *(cells.get(model, "") for model in models)])
    return rows


def shown(names: Iterable[str]) -> list[str]:
    """Return the names of the contenders that the pages show."""
    return [name for name in names if name in ON_PAGE]


def cell(line: Line) -> str:
    """Return the median ratio; of the reference itself, its milliseconds."""
    low, median, high = (line["ratio"][key] for key in ("low", "median", "high"))
    if low == high == 1:
        return f"{line['milliseconds']['median']:.2f}\N{NO-BREAK SPACE}ms"
    return f"{median:.2f}"


def with_quartiles(line: Line) -> str:
    """Return the median ratio and its quartiles, if it is not the reference."""
    low, high = line["ratio"]["low"], line["ratio"]["high"]
    return cell(line) if low == high == 1 else f"{cell(line)} ({low:.2f}–{high:.2f})"


def of_shares(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the share of a step in PyTorch."""
    framework = "PyTorch, 1 thread" if saved["threads"] == 1 else "PyTorch"
    return share_tables(framework, saved["shares"])


def of_parts(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the parts of a step in microseconds, a line per model and clipper."""
    models = saved["microseconds"]
    parts = list(next(iter(next(iter(models.values())).values())))
    rows = [["", "", *parts]]
    for model, steps in models.items():
        for name, took in steps.items():
            rows.append([model, name, *(f"{took[part]:.0f}" for part in parts)])
    checks = [["", "step", "by hand, with a module", "attached to an optimizer"]]
    for model, took in saved["checks"].items():
        step, *rest = took.values()
        cells = (f"{one:.1f} ({one / step:.2%})" for one in rest)
        checks.append([model, f"{step:.0f}", *cells])
    return {"parts": rows, "checks": checks}


def of_growth(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the time of a step late in a run, by rows; and what all norms cost."""
    last = of(saved["steps"], steps=values(saved["steps"], "steps")[-1])
    rows = [["policy", *(f"rows: {spaced(n)}" for n in values(last, "rows"))]]
    for policy in values(last, "policy"):
        rows.append([f"`{policy}`", *map(time_of, of(last, policy=policy))])
    every = [["norms", "one step", "to record, mean", "to record, longest", "state"]]
    for line in saved["all_norms"]:
        times = (seconds(line[key]) for key in ("median", "mean", "longest"))
        every.append([spaced(line["norms"]), *times, size(line["state_bytes"])])
    return {"growth": rows, "all norms": every}


def time_of(case: Mapping[str, Any]) -> str:
    """Return the time of a step, or that the state was too large to measure it."""
    return "–" if case["median"] is None else seconds(case["median"])


def of_peaks(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return KiB of torch and Python together, a column per model."""
    models = saved["peak_bytes_of_torch_and_of_python"]
    rows = [["KiB", *models]]
    for name in shown(next(iter(models.values()))):
        peaks = (sum(column[name]) / 2**10 for column in models.values())
        rows.append([name, *(f"{peak:.0f}" for peak in peaks)])
    return {"memory": rows}


def of_trust(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the ratios of time; and memory, with `TrustClip` and of AdamW alone."""
    kinds = saved["bytes"]
    rows = [["", *(f"{what}, {kind}" for kind in kinds for what in ("time", "memory"))]]
    for model in values(saved["results"], "model"):
        row = [model]
        for kind, sizes in kinds.items():
            lines = of(saved["results"], model=model, kind_of_adamw=kind)
            names = lines[1]["contender"], lines[0]["contender"]
            row.append(", ".join(map(cell, lines[1:])))
            row.append(", ".join(multiple(sizes[model], name) for name in names))
        rows.append(row)
    return {"TrustClip": rows}


def multiple(sizes: Mapping[str, int], name: str) -> str:
    """Return what the first step allocates at its peak, in bytes of the weights."""
    return f"{sizes[f'{name}, first step'] / sizes['weights']:.2f}"


def of_jax(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return ratios, times to compile, also as ratios, and the shares of a step.

    Of models without shares, the page has only the time to compile.
    """
    compiling, shares = saved["seconds_to_compile"], saved["shares"]
    lines = [line for line in large(saved["results"]) if line["model"] in shares]
    names = dict.fromkeys(name for times in compiling.values() for name in times)
    reference = next(iter(names))
    rows = [["", *compiling]]
    for name in names:
        ratios_of_name = (
            f"{times[name] / times[reference]:.2f}" if name in times else ""
            for times in compiling.values()
        )
        rows.append([name, *ratios_of_name])
    rows[1] = [
        reference,
        *(f"{times[reference]:.2f} s" for times in compiling.values()),
    ]
    tables = {
        f"JAX, {to}": ratios(of(lines, regime=to)) for to in values(lines, "regime")
    }
    tables["JAX, time to compile"] = rows
    return tables | share_tables("JAX", shares)


def of_keras(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the ratios to `global_clipnorm`, and the shares of a step."""
    tables = {"Keras": ratios(large(saved["results"]))}
    return tables | share_tables("Keras", saved["shares"])


def large(lines: Sequence[Line]) -> list[Line]:
    """Return the lines of models whose step takes longer than a fixed cost."""
    return [line for line in lines if line["model"] != SMALLEST]


def of_gpu(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return ratios and shares of the bandwidth; nothing where there is no device."""
    tables = {}
    for model, types in saved.get("results", {}).items():
        for dtype, regimes in types.items():
            for part in ("clip", "fused", "foreach"):
                lines = [line for parts in regimes.values() for line in parts[part]]
                rows = [["ratio, of the bandwidth", *regimes]]
                for name in values(lines, "contender"):
                    cells = {x["regime"]: x for x in of(lines, contender=name)}
                    rows.append([name, *(_with_share(cells.get(r)) for r in regimes)])
                tables[f"{model}, {dtype}, {part}"] = rows
    return tables


def _with_share(line: Line | None) -> str:
    """Return ratio and share of the bandwidth of a contender, if it was timed."""
    return "" if line is None else f"{cell(line)}, {line['share']:.0%}"


def of_startup(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the CPU milliseconds of each import and command."""
    rows = [["CPU milliseconds", "median", "garbage collection"]]
    for name, took in saved["results"].items():
        medians = [
            took[part]["median"] if part in took else None
            for part in ("itself", "collections")
        ]
        rows.append([name, *("" if ms is None else f"{ms:.0f}" for ms in medians)])
    return {"startup": rows}


MAKERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Rows]]] = {
    "run": of_run,
    "share": of_shares,
    "fixed_cost": of_parts,
    "fused": lambda saved: {"fused": ratios(saved["results"])},
    "growth": of_growth,
    "memory": of_peaks,
    "trust": of_trust,
    "jax_steps": of_jax,
    "keras_steps": of_keras,
    "gpu": of_gpu,
    "startup": of_startup,
}
"""By the script that saved the numbers; others print what they found by themselves."""


def of(lines: Sequence[Line], **labels: Any) -> list[Line]:
    """Return the lines with these labels."""
    return [x for x in lines if all(x.get(k) == v for k, v in labels.items())]


def values(lines: Sequence[Line], key: str) -> list[Any]:
    """Return the different values of a label, in their order."""
    return list(dict.fromkeys(line[key] for line in lines))
