"""The tables of what the scripts have found: rows of text, for page and terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layout import Rows, seconds, size, spaced
from regimes import PASSES, REGIMES

Line = Mapping[str, Any]
"""One contender on one model; `timing.compare` makes it."""


def make_tables(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the tables of what one script saved, by the names they have in docs."""
    make = MAKERS.get(saved["script"])
    return make(saved) if make else {}


def of_run(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return each regime's ratios, and the time of the bytes."""
    lines = saved["results"]
    clip = [line for line in lines if line["kind"] != "limit"]
    return {
        **{regime: ratios(of(clip, regime=regime)) for regime in REGIMES},
        "bytes": bytes_over_time(lines, saved["parameters"]),
    }


def ratios(lines: Sequence[Line]) -> Rows:
    """Return medians (quartiles), a column per model, the least of our kind in bold."""
    models, names = values(lines, "model"), values(lines, "contender")
    rows = [["", *models]] + [[name] for name in names]
    for model in models:
        own = {line["contender"]: line for line in of(lines, model=model)}
        clip = [line for line in own.values() if line.get("kind") in ("ours", "theirs")]
        least = min((middle(line) for line in clip), default=None)
        for row, name in zip(rows[1:], names, strict=True):
            text = cell(own[name]) if name in own else ""
            best = name in own and own[name] in clip and middle(own[name]) == least
            row.append(f"**{text}**" if best else text)
    rounds = (of(lines, model=model)[0]["rounds"] for model in models)
    return [*rows, ["rounds", *map(str, rounds)]]


def cell(line: Line) -> str:
    """Return a ratio with its quartiles; of the reference itself, its milliseconds."""
    low, median, high = (line["ratio"][key] for key in ("low", "median", "high"))
    if low == high == 1:
        return f"{line['milliseconds']['median']:.2f} ms"
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def bytes_over_time(lines: Sequence[Line], parameters: Mapping[str, int]) -> Rows:
    """Return what each limit takes, and how many bytes a second that is."""
    rows = [["", *parameters]]
    rows.append(["gradients", *(f"{4e-6 * n:.1f} MB" for n in parameters.values())])
    for name, passes in PASSES.items():
        rows.append([name])
        for model, n in parameters.items():
            took = of(lines, model=model, contender=name)[0]["milliseconds"]["median"]
            gigabytes = 4e-9 * n * passes / (1e-3 * took)
            rows[-1].append(f"{took:.2f} ms, {gigabytes:.0f} GB/s")
    return rows


def of_shares(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the share of a training step that each way to clip takes."""
    shares, times = saved["shares"], saved["milliseconds"]
    rows = [["", *shares]]
    steps = (
        own["backward"]["median"] + own["AdamW"]["median"] for own in times.values()
    )
    rows.append(["a step without clipping", *(f"{step:.0f} ms" for step in steps)])
    for name in next(iter(shares.values())):
        cells = (100 * own[name]["median"] for own in shares.values())
        rows.append([name, *(f"{cell:.1f} %" for cell in cells)])
    return {"share": rows}


def of_parts(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the parts of a step in microseconds, a line per model and clipper."""
    found = saved["microseconds"]
    parts = list(next(iter(next(iter(found.values())).values())))
    rows = [["", "", *parts]]
    for model, steps in found.items():
        for name, took in steps.items():
            rows.append([model, name, *(f"{took[part]:.0f}" for part in parts)])
    checks = [["", "step", "with its module", "with its optimizer"]]
    for model, took in saved["checks"].items():
        step, *rest = took.values()
        cells = (f"{one:.1f} ({one / step:.2%})" for one in rest)
        checks.append([model, f"{step:.0f}", *cells])
    return {"parts": rows, "checks": checks}


def of_growth(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return time and memory late in a run, by rows; and what all norms cost."""
    cells = {(c["policy"], c["rows"], c["steps"]): c for c in saved["steps"]}
    steps = values(saved["steps"], "steps")
    rows = [["one step · state", "rows", *(f"step {spaced(n)}" for n in steps)]]
    for policy, many in dict.fromkeys(key[:2] for key in cells):
        own = (cells[policy, many, n] for n in steps)
        rows.append([f"`{policy}`", spaced(many), *map(time_and_state, own)])
    every = [["norms", "one step", "to record, mean", "to record, longest", "state"]]
    for line in saved["all_norms"]:
        times = (seconds(line[key]) for key in ("median", "mean", "longest"))
        every.append([spaced(line["norms"]), *times, size(line["state_bytes"])])
    return {"growth": rows, "all norms": every}


def time_and_state(case: Mapping[str, Any]) -> str:
    """Return the time of a step, where it was measured, and the size of the state."""
    took = case["median"]
    return ("" if took is None else f"{seconds(took)} · ") + size(case["state_bytes"])


def of_peaks(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return KiB of torch + of Python, a column per model."""
    found = saved["peak_bytes_of_torch_and_of_python"]
    rows = [["", *found]]
    for name in next(iter(found.values())):
        peaks = (column[name] for column in found.values())
        cells = (" + ".join(f"{peak / 2**10:.0f}" for peak in own) for own in peaks)
        rows.append([name, *cells])
    return {"memory": rows}


def of_trust(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return the ratios for each AdamW, and the memory as multiples of the weights."""
    found = {}
    for kind, models in saved["bytes"].items():
        lines = of(saved["results"], kind_of_adamw=kind)
        found[f"TrustClip, {kind}"] = ratios(lines)
        rows = [["", *models]]
        for name in next(iter(models.values())):
            cells = (own[name] / own["weights"] for own in models.values())
            rows.append([name, *(f"{multiple:.2f}" for multiple in cells)])
        sizes = (f"{own['weights'] / 1e6:.1f} MB" for own in models.values())
        rows[1] = ["weights", *sizes]
        found[f"TrustClip, {kind}, memory"] = rows
    return found


def of_jax(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return each reference's ratios, and the times to compile, also as ratios."""
    lines, compiling = saved["results"], saved["seconds_to_compile"]
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
    found = {
        f"JAX, {to}": ratios(of(lines, regime=to)) for to in values(lines, "regime")
    }
    return found | {"JAX, time to compile": rows}


def of_gpu(saved: Mapping[str, Any]) -> dict[str, Rows]:
    """Return ratios and shares of the bandwidth; nothing where there is no device."""
    found = {}
    for model, parts in saved.get("results", {}).items():
        for part in ("clip", "fused"):
            rows = [["", "ratio", "of the bandwidth"]]
            for line in parts[part]:
                rows.append([line["contender"], cell(line), f"{line['share']:.0%}"])
            found[f"{model}, {part}"] = rows
    return found


MAKERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Rows]]] = {
    "run": of_run,
    "share": of_shares,
    "fixed_cost": of_parts,
    "fused": lambda saved: {"fused": ratios(saved["results"])},
    "growth": of_growth,
    "memory": of_peaks,
    "trust": of_trust,
    "jax_steps": of_jax,
    "keras_steps": lambda saved: {"Keras": ratios(saved["results"])},
    "gpu": of_gpu,
}
"""By the script that saved the numbers; others print what they found by themselves."""


def of(lines: Sequence[Line], **labels: str) -> list[Line]:
    """Return the lines with these labels."""
    return [x for x in lines if all(x.get(k) == v for k, v in labels.items())]


def values(lines: Sequence[Line], key: str) -> list[Any]:
    """Return the different values of a label, in their order."""
    return list(dict.fromkeys(line[key] for line in lines))


def middle(line: Line) -> float:
    """Return the median of the ratios."""
    return float(line["ratio"]["median"])
