"""One self-contained page about a run: summary, advice, pictures and settings."""

import base64
import html
import io
from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

from .clip_log import ClipLog
from .summary import Summary, number, percent

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: normal; color: #555;
     padding: .15rem 2rem .15rem 0; }
td { padding: .15rem 0; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
li { margin: .3rem 0; }
li.red { font-weight: 600; }
li.red::marker { content: "\\25B2  "; color: #D55E00; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
figcaption { color: #555; font-size: .9rem; }
@media print { body { margin: 0; max-width: none; } figure { break-inside: avoid; } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the browser may load: nothing that is not on the page."""


def write_report(
    log: ClipLog, path: str | PathLike[str], title: str = "Gradient clipping report"
) -> None:
    """Write a page that needs no network: summary, advice, pictures and settings.

    Args:
      log: what the run recorded; its `settings` are shown.
      path: where to write the HTML.
      title: what stands above it.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.

    >>> import tempfile, pathlib
    >>> log = ClipLog(settings={"policy": "Fixed(2.0)"})
    >>> for norm in [1.0, 4.0]:
    ...     log.record(norm=norm, threshold=2.0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "report.html")
    ...     write_report(log, path)
    ...     "clipping rate 50 %" in path.read_text(encoding="utf-8")
    True
    """
    page = report_html(log, title)
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def report_html(log: ClipLog, title: str = "Gradient clipping report") -> str:
    """Return the page as text.

    Raises:
      ImportError: matplotlib is not installed.
    """
    summary = log.summary()
    heading = html.escape(title)
    parts = [
        f"<h1>{heading}</h1>",
        f"<p>{summary.steps} steps, clipping rate {percent(summary.clip_rate)}, "
        f"mean scale {number(summary.mean_scale)}</p>",
        "<h2>What it says</h2>",
        advice(summary.advice),
        picture(log.plot, "Norm, threshold and clipped steps over the run"),
        "<h2>Numbers</h2>",
        table(figures(summary)),
        picture(log.plot_histogram, "How the norms are distributed"),
    ]
    if log.names:
        parts += [
            "<h2>Rows</h2>",
            table((name, percent(rate)) for name, rate in summary.worst_rows),
            picture(log.plot_rows, "Which row was clipped when"),
        ]
    parts += ["<h2>Settings</h2>", settings(log)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def advice(sentences: Iterable[str]) -> str:
    """Return the advice as a list; red lights stand out."""
    items = (
        f'<li class="red">{html.escape(said)}</li>'
        if said.startswith("Red light")
        else f"<li>{html.escape(said)}</li>"
        for said in sentences
    )
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def figures(summary: Summary) -> list[tuple[str, str]]:
    """Return the numbers of a summary as a person reads them."""
    lately = f"clipping rate of the last {summary.recent}"
    none = summary.threshold == float("inf")
    return [
        ("steps", str(summary.steps)),
        ("recorded with a finite norm", str(summary.measured)),
        ("clipping rate", percent(summary.clip_rate)),
        (lately, percent(summary.recent_clip_rate)),
        ("mean scale", number(summary.mean_scale)),
        ("threshold now", "none" if none else number(summary.threshold)),
        ("norm, mean", number(summary.mean_norm)),
        ("norm, median", number(summary.median_norm)),
        ("norm, p90", number(summary.p90_norm)),
        ("norm, p99", number(summary.p99_norm)),
        ("norm, largest", number(summary.max_norm)),
        ("non-finite steps", str(summary.nonfinite)),
        ("skipped steps", str(summary.skipped)),
    ]


def settings(log: ClipLog) -> str:
    """Return what the log was told of the run."""
    if log.settings:
        return table(log.settings.items(), kind="text")
    return (
        '<p>None were given; <code>ClipLog(settings={"policy": policy})</code> '
        "keeps them.</p>"
    )


def table(rows: Iterable[tuple[str, str]], kind: str = "number") -> str:
    """Return pairs of a name and a value as a table."""
    lines = (
        f'<tr><th scope="row">{html.escape(name)}</th>'
        f'<td class="{kind}">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def picture(plot: Callable[..., Any], caption: str) -> str:
    """Return a picture that is part of the page."""
    buffer = io.BytesIO()
    plot().savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    words = html.escape(caption)
    return (
        f'<figure><img alt="{words}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words}</figcaption></figure>"
    )
