"""One self-contained page about a run: summary, advice, pictures and settings."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from autoclip_core.files.names import make_printable
from autoclip_core.files.replace_file import open_replacement
from autoclip_core.record.largest import LargeStep
from autoclip_core.record.statistics import median
from autoclip_core.series.spikes import SPIKE

from .clip_log import ClipLog
from .formatting import format_number, format_percent, format_rate
from .summary import Summary

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: normal; color: #555;
     padding: .15rem 2rem .15rem 0; }
th.number { text-align: right; padding: .15rem 0 .15rem 1rem; }
td { padding: .15rem 0; overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td + td { padding-left: 1rem; }
li { margin: .3rem 0; }
li.red { font-weight: 600; }
li.red::marker { content: "\\25B2  "; color: #D55E00; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; }
figcaption { color: #555; font-size: .9rem; }
@media print { body { margin: 0; max-width: none; } figure { break-inside: avoid; } }
"""

MOST_SPIKES = 10
"""Number of spikes that the page lists."""

CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""The browser may load nothing from outside the page."""


def write_report(
    log: ClipLog, path: str | PathLike[str], title: str = "Gradient clipping report"
) -> None:
    """Write a page that needs no network: summary, advice, pictures and settings.

    Args:
      log: the log of the run; the page also shows its `settings`.
      path: where to write the HTML.
      title: the title of the page.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.

    >>> from pathlib import Path
    >>> log = ClipLog(settings={"policy": "Fixed(2.0)"})
    >>> for norm in [1.0, 4.0]:
    ...     log.record(norm=norm, threshold=2.0)
    >>> write_report(log, "report.html")
    >>> "clip rate 50 %" in Path("report.html").read_text(encoding="utf-8")
    True
    """
    page = make_page(log, title)
    with open_replacement(path, encoding="utf-8") as file:
        file.write(page)


def make_page(log: ClipLog, title: str) -> str:
    """Return the HTML of the page."""
    summary = log.summary()
    heading = escape_text(title)
    rate = format_rate(summary.clip_rate, summary.has_several_rows)
    parts = [
        f"<h1>{heading}</h1>",
        f"<p>{summary.steps} steps, clip rate {rate}, "
        f"mean scale {format_number(summary.mean_scale)}</p>",
    ]
    if log.updates is None or summary.updates is None:
        parts += describe_log(log, summary)
    else:
        parts += ["<h1>Gradients</h1>", *describe_log(log, summary)]
        parts += ["<h1>Updates</h1>", *describe_log(log.updates, summary.updates)]
    parts += ["<h2>Settings</h2>", format_settings(log)]
    return frame_page(heading, "\n".join(parts))


def escape_text(text: str) -> str:
    """Return a text as HTML; control characters are escaped, as on a terminal."""
    return html.escape("\n".join(map(make_printable, text.split("\n"))))


def frame_page(heading: str, body: str) -> str:
    """Return a whole HTML page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )


def describe_log(log: ClipLog, summary: Summary) -> list[str]:
    """Return the advice, the pictures and the tables about a log."""
    parts = [
        "<h2>Advice</h2>",
        format_advice(summary.advice),
        embed_picture(log.plot, "Norm, threshold and clipped steps over the run"),
        *format_spikes(select_spikes(log), summary),
        "<h2>Numbers</h2>",
        format_html_table(summary.rows()),
        embed_picture(log.plot_histogram, "Distribution of the norms"),
    ]
    if len(log.names) > 1:
        rates = ((name, format_percent(rate)) for name, rate in summary.worst_rows)
        parts += ["<h2>Rows</h2>", format_html_table(rates)]
        parts += [embed_picture(log.plot_rows, "Clip rate of each row over the run")]
    return parts


def select_spikes(log: ClipLog) -> list[LargeStep]:
    """Return the largest steps whose ratio is five times the median ratio of the run.

    A bound that always acts has none.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scales = log.scales
        ratios = 1 / scales if log._has_several_rows else log.norms / log.thresholds
    typical = median(ratios[np.isfinite(ratios)])
    return [s for s in log.largest[:MOST_SPIKES] if s.ratio >= SPIKE * typical]


def format_spikes(spikes: Sequence[LargeStep], summary: Summary) -> list[str]:
    """Return the spikes as HTML, below a heading; nothing without spikes."""
    if not spikes:
        return []
    lines = [
        f'<tr><td class="number">{spike.step}</td>'
        f'<td class="number">{format_number(spike.ratio)}</td>'
        f'<td class="number">{format_number(spike.norm)}</td>'
        f"<td>{escape_text(name_rows(spike))}</td></tr>"
        for spike in spikes
    ]
    heads = ['<th class="number">' + name for name in ("step", "ratio", "norm")]
    has_names = any(map(name_rows, spikes))
    rest = ", of the recorded steps" if summary.recorded < summary.steps else ""
    return [
        "<h2>Largest spikes</h2>",
        f"<p>The steps that exceeded their thresholds most{rest}, by at least "
        f"{SPIKE:g} times the median ratio. The ratio is that of the row with the "
        "largest norm / threshold.</p>\n"
        f"<table>\n<tr>{'</th>'.join(heads)}</th><th>{'rows' * has_names}</th></tr>\n"
        + "\n".join(lines)
        + "\n</table>",
    ]


def name_rows(spike: LargeStep) -> str:
    """Return the rows of a spike with their ratios."""
    return ", ".join(f"{name} ({format_number(ratio)})" for name, ratio in spike.rows)


def format_advice(sentences: Iterable[str]) -> str:
    """Return the advice as a list; sentences with a red light are highlighted."""
    items = (
        f'<li class="red">{escape_text(sentence)}</li>'
        if sentence.startswith("Red light")
        else f"<li>{escape_text(sentence)}</li>"
        for sentence in sentences
    )
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def format_settings(log: ClipLog) -> str:
    """Return the settings as an HTML table. Without any, return how to add them."""
    if log.settings:
        return format_html_table(log.settings.items(), kind="text")
    return (
        '<p>The log has no settings. <code>ClipLog(settings={"policy": policy})</code> '
        "adds them.</p>"
    )


def format_html_table(rows: Iterable[tuple[str, str]], kind: str = "number") -> str:
    """Return an HTML table with one row per (name, value) pair."""
    lines = (
        f'<tr><th scope="row">{escape_text(name)}</th>'
        f'<td class="{kind}">{escape_text(value)}</td></tr>'
        for name, value in rows
    )
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def embed_picture(plot: Callable[..., Any], caption: str) -> str:
    """Return a figure as an HTML element that contains the PNG."""
    buffer = io.BytesIO()
    plot().savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    caption = escape_text(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
