"""What the settings of a log say about its clipper: the policy, a dry run."""

import re
from collections.abc import Mapping

ARGUMENTS = {
    **dict.fromkeys(("Quantile", "QuantileClip", "StreamingQuantile"), "quantile"),
    "TrustClip": "quantile",
    **dict.fromkeys(("MeanStd", "StandardClip"), "deviations"),
    **dict.fromkeys(("ZScore", "ZClip"), "z"),
    **dict.fromkeys(("EmaRatio", "AdaGC"), "ratio"),
    **dict.fromkeys(("Fixed", "NormClip"), "max_norm"),
    **dict.fromkeys(("ParamRatio", "AGC"), "clipping"),
    **{"TrustRatio": "clipping", "LARC": "trust_coefficient"},
    **{"ValueClip": "clip_value", "Scheduled": "the thresholds of the schedule"},
}
"""The argument that raises the threshold, by the name of a policy or a clipper."""

CAP = "set `max_threshold` (JAX: `Cap(policy, max_norm)`)"
TRUST = "bound the update with TrustClip (JAX: `trust_clip`)"
WARMUP = "set `warmup_threshold` (JAX: `Warmup(policy, steps, threshold)`)"
"""Actions whose names differ between the frameworks."""

FOLLOWS_NO_NORM = {"Fixed", "NormClip", "ParamRatio", "AGC", "TrustRatio", "LARC"}
FOLLOWS_NO_NORM |= {"ValueClip", "Scheduled"}
"""Policies whose threshold does not depend on past norms."""


def find_policy(settings: Mapping[str, str]) -> str:
    """Return the policy or the clipper that the settings of a log name.

    `TrustClip` comes first, then the outermost that is no combinator; "" if there is
    none.

    >>> find_policy({"policy": "Cap(policy=ZScore(z=2.5), max_norm=1.0)"})
    'ZScore'
    """
    text = " ".join(settings.values())
    names = re.findall(r"\b[A-Z][A-Za-z]+(?=\()", text)
    if "TrustClip" in names:
        return "TrustClip"
    return next((name for name in names if name in ARGUMENTS), "")


def records_clipped_norms(settings: Mapping[str, str]) -> bool | None:
    """Return whether the policy records norms after clipping; None if it is unknown.

    >>> records_clipped_norms({"policy": "ZScore(z=2.5, record='applied')"})
    True
    >>> records_clipped_norms({"policy": "Quantile(quantile=0.5)"})
    False
    """
    policy = find_policy(settings)
    if policy in ("ZScore", "ZClip"):
        return any("record='applied'" in value for value in settings.values())
    return policy in ("EmaRatio", "AdaGC") if policy else None


def select_settings(settings: Mapping[str, str], is_update: bool) -> dict[str, str]:
    """Return the settings that can name the policy of the gradients, or of the updates.

    >>> settings = {"clipper": "UpdateClipper(ParamRatio(clipping=0.1))", "batch": "8"}
    >>> select_settings(settings, is_update=False)
    {'batch': '8'}
    """
    return {
        name: value
        for name, value in settings.items()
        if "TrustClip(" in value
        or is_update == ("UpdateClipper(" in value or "update" in name.lower())
    }


def is_dry_run(settings: Mapping[str, str], is_update: bool) -> bool:
    """Return whether the settings say that the clipper changed nothing.

    >>> is_dry_run({"clipper": "NormClip(max_norm=1.0, dry_run=True)"}, False)
    True
    """
    values = select_settings(settings, is_update).values()
    is_named = any("dry_run=True" in value for value in values)
    return is_named or settings.get("dry_run") == "True"


def name_argument(settings: Mapping[str, str]) -> str:
    """Return what to raise, so that the policy of the gradients clips less."""
    argument = ARGUMENTS.get(find_policy(settings), "the threshold")
    return argument if " " in argument else f"`{argument}`"
