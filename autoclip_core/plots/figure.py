"""A new figure, how it is saved, and the colours of all pictures."""

import os
from os import PathLike
from typing import Any

from autoclip_core.files.replace_file import open_replacement

# Colour-blind readers can distinguish these colours (Okabe and Ito; the purple is
# Tol's). Shapes differ too, so that the picture can be read without colour.
BLUE, ORANGE, PURPLE, BLACK = "#0072B2", "#D55E00", "#AA3377", "#000000"
GREEN = "#009E73"

GRADIENT = "L2 norm of the gradient\n(loss per unit of parameter)"
"""The label of the axis of norms."""


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure that is not registered with pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'a picture needs matplotlib: pip install "autoclip-toolkit[plot]"'
        ) from error
    return Figure(figsize=size, dpi=120, layout="constrained")


def save_figure(figure: Any, path: str | PathLike[str] | None) -> Any:
    """Save a figure unless `path` is None, and return it; the suffix is the format."""
    if path is not None:
        name, suffix = os.path.splitext(os.fspath(path))
        suffix = suffix or ".png"
        with open_replacement(name + suffix, "wb") as file:
            figure.savefig(file, format=suffix[1:])
    return figure
