"""Policies by name, with an option for each argument that one of them takes."""

import argparse
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from autoclip_core.clipper.settings import PolicyBounds
from autoclip_core.policies.ema_ratio import EmaRatio
from autoclip_core.policies.fixed import Fixed
from autoclip_core.policies.mean_std import MeanStd
from autoclip_core.policies.quantile import Quantile
from autoclip_core.policies.streaming_quantile import StreamingQuantile
from autoclip_core.policies.zscore import ZScore
from autoclip_core.policy import Policy

POLICIES: Mapping[str, type[Policy]] = {
    "quantile": Quantile,
    "streaming-quantile": StreamingQuantile,
    "mean-std": MeanStd,
    "zscore": ZScore,
    "ema-ratio": EmaRatio,
    "fixed": Fixed,
}
"""Those that need nothing but the norms."""

AROUND = ("warmup_steps", "warmup_threshold", "min_threshold", "max_threshold")
"""What may go around any of them."""

HELP = {
    "quantile": "the quantile of past norms, 0 to 1 (0.9 clips 10 %%)",
    "history_length": "steps that are remembered, or none for all",
    "include_current": "whether the current norm is in the window that limits it",
    "rate": "the step of the logarithm of a streaming quantile",
    "deviations": "standard deviations above the mean",
    "log": "whether to take mean and deviation of the logarithms",
    "ddof": "the deviation divides by n - ddof",
    "z": "deviations above the moving average",
    "alpha": "the memory of zscore, 0 to 1",
    "target": "zscore: reciprocal, mean or threshold",
    "record": "zscore: winsorized, applied, raw or none",
    "ratio": "the threshold over the moving average, above 1",
    "beta": "the memory of ema-ratio, 0 to 1",
    "max_norm": "the constant threshold of fixed",
    "warmup_steps": "norms before the policy takes over",
    "warmup_threshold": "the threshold until then",
    "min_threshold": "the threshold is never below",
    "max_threshold": "the threshold is never above",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --policy and an option for every argument of every policy."""
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy",
        choices=POLICIES,
        default="quantile",
        help="which one (default: quantile, of 0.9)",
    )
    for name, meaning in HELP.items():
        option = "--" + name.replace("_", "-")
        takers = [key for key, policy in POLICIES.items() if name in parameters(policy)]
        of = f" [{', '.join(takers)}]" if takers and name not in AROUND else ""
        if name in ("log", "include_current"):
            group.add_argument(
                option, action=argparse.BooleanOptionalAction, help=meaning + of
            )
        else:
            kind = KINDS.get(name, float)
            metavar = name.rpartition("_")[2].upper()
            group.add_argument(option, type=kind, metavar=metavar, help=meaning + of)


def as_length(text: str) -> int | None:
    """Return a number of steps; "none" is all of them."""
    return ALL if text.lower() == "none" else int(text)


ALL: Any = object()
"""`--history-length none`, which is not the same as no option."""

KINDS: Mapping[str, Any] = {
    "history_length": as_length,
    "ddof": int,
    "warmup_steps": int,
    "target": str,
    "record": str,
}
as_length.__name__ = "number of steps"  # argparse: "invalid number of steps value"


def parameters(policy: type[Policy]) -> list[str]:
    """Return the arguments of a policy."""
    return [name for name in inspect.signature(policy).parameters if name != "_"]


def make_policy(options: argparse.Namespace) -> Policy:
    """Return the policy that the options describe.

    Raises:
      ValueError: an option is out of its range, missing, or not one of the policy's.
    """
    kind = POLICIES[options.policy]
    own = parameters(kind)
    given: dict[str, Any] = {
        name: None if value is ALL else value
        for name in HELP
        if (value := getattr(options, name)) is not None
    }
    around = {name: given.pop(name) for name in AROUND if name in given.keys() - own}
    for name in given:
        if name not in own:
            takes = ", ".join("--" + name.replace("_", "-") for name in own)
            wrong = "--" + name.replace("_", "-")
            raise ValueError(
                f"{wrong} is no option of --policy {options.policy}, which takes "
                f"{takes}"
            )
    if options.policy == "fixed" and not given:
        raise ValueError(
            "--policy fixed needs --max-norm; `autoclip suggest` finds one"
        )
    policy = kind(**given)
    bounds = PolicyBounds(
        around.get("warmup_steps", 0),
        around.get("warmup_threshold"),
        around.get("min_threshold"),
        around.get("max_threshold"),
    )
    return bounds.apply(policy)


def refuse_options(options: argparse.Namespace) -> None:
    """Refuse the options of a policy where all policies are compared.

    Raises:
      ValueError: there is one.
    """
    for name in HELP:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is for one policy; leave it or --compare out")


def candidates(norms: Any) -> dict[str, Policy]:
    """Return the policies to compare, by a short name; `Fixed` is at the p90."""
    known = np.asarray(norms, np.float64)
    known = known[np.isfinite(known) & (known > 0)]
    policies: dict[str, Policy] = {
        "quantile 0.9": Quantile(0.9),
        "quantile 0.5": Quantile(0.5),
        "streaming-quantile 0.9": StreamingQuantile(0.9),
        "mean-std 2": MeanStd(2.0),
        "mean-std 2 log": MeanStd(2.0, log=True),
        "zscore 2.5": ZScore(2.5),
        "ema-ratio 1.05": EmaRatio(1.05),
        "ema-ratio 2": EmaRatio(2.0),
    }
    if known.size:
        p90 = float(2 * np.quantile(known / 2, 0.9))
        policies[f"fixed {p90:.3g}"] = Fixed(p90)
    return policies
