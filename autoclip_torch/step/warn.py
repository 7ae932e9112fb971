"""Warn at the line of the user's code, regardless of the hooks between."""

import sys
import warnings


def warn(text: str) -> None:
    """Warn at the nearest caller outside of this package and of torch."""
    frame = sys._getframe(1)
    while _is_inside(frame.f_globals) and frame.f_back is not None:
        frame = frame.f_back
    warnings.warn_explicit(
        text,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_inside(module: dict[str, object]) -> bool:
    package = str(module.get("__name__", "")).partition(".")[0]
    return package in ("autoclip_torch", "torch")
