"""The golden traces, and the oracle that wrote them; see `golden/README.md`."""

import importlib.util
import json
import pathlib
import sys
from functools import cache, partial

import numpy as np

from .cases import policy_of, series_of

GOLDEN = pathlib.Path(__file__).parent / "golden"


@cache
def oracle():
    """Return the script that wrote the traces, as a module."""
    path = GOLDEN / "make_traces.py"
    spec = importlib.util.spec_from_file_location("make_traces", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_traces"] = module  # its dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@cache
def golden():
    """Return the file that `make_traces.py` wrote."""
    return json.loads((GOLDEN / "traces.json").read_text(encoding="utf-8"))


def traced_policies():
    """Return the expressions of all policies with traces."""
    return list(dict.fromkeys(trace["policy"] for trace in golden()["traces"]))


def check_traces(run, code, steps=None):
    """Compare all golden traces of one policy with the results of `run`.

    Args:
      run: a function of a policy and a `Series` that returns thresholds and scales, of
        shape (steps, rows).
      code: the policy, an expression in the names of `autoclip_core`.
      steps: compare only this many first steps.
    """
    traces = [trace for trace in golden()["traces"] if trace["policy"] == code]
    groups = {}
    for trace in traces:
        # Series of one length are rows of one run, unless a row can cancel the others.
        alone = trace["series"] if "skip" in code else None
        key = len(trace["scales"][:steps]), trace.get("param_norms"), alone
        groups.setdefault(key, []).append(trace)
    for (length, of_params, _), group in groups.items():
        norms = [golden()["series"][trace["series"]][:length] for trace in group]
        series = series_of(np.transpose(norms))
        if of_params is not None:
            param_norms = np.float32(golden()["param_norms"][of_params][:length])
            series = series._replace(
                param_norms=np.repeat(param_norms[:, None], len(group), axis=1)
            )
        thresholds, scales = run(policy_of(code), series)
        for row, trace in enumerate(group):
            check = partial(
                np.testing.assert_allclose,
                rtol=trace["rtol"],
                err_msg=f"{code} on {trace['series']}",
            )
            check(np.asarray(thresholds)[:, row], trace["thresholds"][:length])
            check(np.asarray(scales)[:, row], trace["scales"][:length])
