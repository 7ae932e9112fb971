"""The policies of the command line by name, and an option for each argument."""

import argparse
import inspect
from collections.abc import Mapping
from typing import Any

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
"""The policies that need only the norms."""

NEEDS_WEIGHTS = {"trust": "clip/update_clip_rate", "param-ratio": "clip/clip_rate"}
"""What cannot be replayed, and the metric of a run that answers instead."""

BOUNDS = ("warmup_steps", "warmup_threshold", "min_threshold", "max_threshold")
"""The options that apply to every policy."""

HELP = {
    "quantile": "the quantile of past norms, 0 to 1 (0.9 clips 10 %%)",
    "history_length": "steps in the history, or none for all steps",
    "include_current": "whether the window includes the current norm",
    "rate": "the step size of streaming-quantile, in the logarithm of the norm",
    "deviations": "standard deviations above the mean",
    "log": "whether to use the mean and deviation of the logarithms",
    "ddof": "the deviation divides by n - ddof",
    "z": "deviations above the moving average",
    "alpha": "the decay of the averages of zscore, 0 to 1",
    "target": "zscore: reciprocal, mean or threshold",
    "record": "zscore: winsorized, applied, raw or none",
    "ratio": "threshold / moving average, above 1",
    "beta": "the decay of the average of ema-ratio, 0 to 1",
    "max_norm": "the constant threshold of fixed",
    "warmup_steps": "norms that each row records before the policy sets the threshold",
    "warmup_threshold": "the threshold during the warm-up",
    "min_threshold": "the minimum of the threshold",
    "max_threshold": "the maximum of the threshold",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --policy and an option for every argument of every policy."""
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--policy",
        type=parse_name,
        choices=POLICIES,
        default="quantile",
        metavar="POLICY",
        help=f"{', '.join(POLICIES)} (default: quantile, with quantile 0.9). TrustClip "
        "and AGC need the weights, which a series of norms does not have",
    )
    for name, meaning in HELP.items():
        policies = [
            key for key, policy in POLICIES.items() if name in list_arguments(policy)
        ]
        note = f" [{', '.join(policies)}]" if policies and name not in BOUNDS else ""
        settings: dict[str, Any] = {
            "help": meaning + note,
            "default": argparse.SUPPRESS,
        }
        if name in ("log", "include_current"):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = TYPES.get(name, float)
            settings["metavar"] = name.rpartition("_")[2].upper()
        group.add_argument(as_option(name), **settings)


def as_option(name: str) -> str:
    """Return the option of an argument, such as "--max-norm"."""
    return "--" + name.replace("_", "-")


def find_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a policy that are given, by the name of their argument."""
    return {name: value for name, value in vars(options).items() if name in HELP}


def parse_name(text: str) -> str:
    """Return the name of a policy that needs only the norms."""
    if text in NEEDS_WEIGHTS:
        raise argparse.ArgumentTypeError(
            f"{text} needs the weights of the model, which a series of norms does not "
            f"have; train with dry_run=True and read {NEEDS_WEIGHTS[text]}"
        )
    return text


def parse_length(text: str) -> int | None:
    """Return a number of steps; "none" means all steps."""
    return None if text.lower() == "none" else int(text)


TYPES: Mapping[str, Any] = {
    "history_length": parse_length,
    "ddof": int,
    "warmup_steps": int,
    "target": str,
    "record": str,
}
parse_length.__name__ = "number of steps"  # argparse: "invalid number of steps value"


def list_arguments(policy: type[Policy]) -> list[str]:
    """Return the names of a policy's arguments."""
    return [name for name in inspect.signature(policy).parameters if name != "_"]


def make_policy(options: argparse.Namespace) -> Policy:
    """Return the policy that the options describe."""
    kind = POLICIES[options.policy]
    names = list_arguments(kind)
    arguments = find_options(options)
    bounds = {
        name: arguments.pop(name) for name in BOUNDS if name in arguments.keys() - names
    }
    for name in arguments:
        if name not in names:
            raise ValueError(
                f"{as_option(name)} is no option of --policy {options.policy}, which "
                f"takes {', '.join(map(as_option, names))}"
            )
    if options.policy == "fixed" and not arguments:
        raise ValueError(
            "--policy fixed needs --max-norm; `autoclip suggest` finds one"
        )
    policy = kind(**arguments)
    return PolicyBounds(**bounds).apply(policy)


def refuse_options(options: argparse.Namespace) -> None:
    """Check that no option of a single policy is given with --compare."""
    for option in map(as_option, find_options(options)):
        raise ValueError(f"{option} is for one policy; leave out it or --compare")


def make_policies(max_norm: float | None) -> dict[str, Policy]:
    """Return the policies to compare by a short name; `Fixed` only with a constant."""
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
    if max_norm:
        policies[f"fixed {max_norm:.3g}"] = Fixed(max_norm)
    return policies
