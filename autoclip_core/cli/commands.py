"""What each command does: read a file, compute, print or write."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from autoclip_core.files.collect import NoColumn
from autoclip_core.files.read import LoggedNorms, find_files, read_norms
from autoclip_core.log.clip_log import ClipLog
from autoclip_core.log.csv_jsonl import ROWS, Half, write_csv
from autoclip_core.log.report import write_report
from autoclip_core.planning.plot import draw_comparison, draw_replay, replay_to_steps
from autoclip_core.planning.reasons import TRUST_FIRST, advise_on_bound
from autoclip_core.planning.replay import as_series, replay
from autoclip_core.planning.suggest import Suggestion, suggest_threshold
from autoclip_core.policies.quantile import Quantile

from .output import (
    print_comparison,
    print_json,
    print_text,
    report_to_dict,
    suggestion_to_dict,
)
from .policy_options import make_policies, refuse_options
from .progress import make_progress_bar

UPDATE_COLUMNS = "update_norm", "clip/update_norm"
"""The norms of updates in a log of this package."""

ALIGNED = "norms", "steps", "thresholds", "losses"
"""What has an entry for each step that was read."""


def read_steps(options: argparse.Namespace, column: str | None = None) -> LoggedNorms:
    """Return the norms that the options select, or another column of these steps."""
    read = read_norms(options.path, column or options.column)
    if options.until is None:
        return read
    after = np.flatnonzero(read.steps >= options.until)
    end = after[0] if after.size else len(read.steps)
    columns: dict[str, Any] = {}
    for name in ALIGNED:
        values = getattr(read, name)
        columns[name] = None if values is None else values[:end]
    return replace(read, **columns)


def file_to_dict(read: LoggedNorms) -> dict[str, Any]:
    """Return what was read for JSON."""
    return {"column": read.column, "kind": read.kind, "empty": read.empty}


def run_replay(options: argparse.Namespace) -> None:
    """Replay one policy."""
    read = read_steps(options)
    bar = make_progress_bar("replay")
    report = replay(as_series(read.norms), options.policy, progress=bar)
    if options.plot:
        draw_replay(report, options.plot)
    if options.output:
        write_csv(options.output, Half(replay_to_steps(report), {ROWS: 1}))
    if options.json:
        print_json({**file_to_dict(read), **report_to_dict(report)})
    else:
        print_text(read, report)


def run_compare(options: argparse.Namespace) -> None:
    """Replay every policy and print a table."""
    if options.output:
        raise ValueError("--output saves the steps of one policy; leave out --compare")
    refuse_options(options)
    read = read_steps(options)
    norms = as_series(read.norms)
    reports = {
        name: replay(norms, policy, progress=make_progress_bar(name))
        for name, policy in make_policies(suggest_for(read).max_norm).items()
    }
    if options.plot:
        draw_comparison(reports, options.plot)
    if options.json:
        rows = [{"name": name, **report_to_dict(r)} for name, r in reports.items()]
        print_json({**file_to_dict(read), "policies": rows})
    else:
        print_comparison(read, reports)


def run_suggest(options: argparse.Namespace) -> None:
    """Print statistics and a suggested threshold."""
    read = read_steps(options)
    suggestion = suggest_for(read)
    scale = read.column.removesuffix("norm") + "update_scale"
    if scale in read.columns:  # TrustClip wrote the log
        scales = read_steps(options, scale).norms
        rest = [text for text in suggestion.advice if text != TRUST_FIRST]
        advice = *advise_on_bound(suggestion.verdict, scales), *rest
        suggestion = replace(suggestion, advice=advice)
    if options.json:
        print_json({**file_to_dict(read), **suggestion_to_dict(suggestion)})
    else:
        print_text(read, suggestion)


def suggest_for(read: LoggedNorms) -> Suggestion:
    """Return the suggestion for the norms of a file."""
    columns = {name: getattr(read, name) for name in ALIGNED}
    return suggest_threshold(columns.pop("norms"), **columns)


def run_report(options: argparse.Namespace) -> None:
    """Write the HTML page."""
    read = read_run(options)
    page = Path(options.output)
    verb = "overwritten" if page.exists() else "written"
    write_report(read_log(read, options), page, options.title)
    print_text(read, f"{page}: {verb}, {page.stat().st_size // 1000} kB")


def read_run(options: argparse.Namespace) -> LoggedNorms:
    """Return the norms of a run; a log of updates alone has no norm of gradients."""
    try:
        return read_norms(options.path, options.column)
    except NoColumn:
        for name in UPDATE_COLUMNS:
            read = find_column(options.path, name)
            if options.column is None and read and read.thresholds is not None:
                return read
        raise


def find_column(path: str, name: str) -> LoggedNorms | None:
    """Return a column of norms, or None if the file lacks it."""
    try:
        return read_norms(path, name)
    except NoColumn:
        return None


def read_log(read: LoggedNorms, options: argparse.Namespace) -> ClipLog:
    """Return the log in a file; a series of norms is replayed with the default policy.

    The page needs thresholds, and its settings name the policy that set them.
    """
    is_log = read.column in ("norm", "clip/norm", *UPDATE_COLUMNS)
    if options.column is None and is_log and read.thresholds is not None:
        [path] = find_files(options.path)
        if read.kind == "JSON lines":
            return ClipLog.from_jsonl(path)
        if read.kind == "CSV":
            return ClipLog.from_csv(path)
    policy = Quantile(0.9)
    report = replay(as_series(read.norms), policy, progress=make_progress_bar("replay"))
    source = f"column {read.column} of {options.file}"
    settings = {"policy": str(policy), "norms": source}
    return ClipLog.from_steps(replay_to_steps(report), {"settings": settings})
