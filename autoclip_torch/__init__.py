"""Adaptive gradient clipping for PyTorch: a clipper between backward and update.

The files here are public; they may import the folders, which are private
(`ClippedOptimizer` is exported from one). Read `clipper.py` first.
"""

try:
    from array_api_compat import torch as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("array_api_compat", "torch"):
        raise
    raise ModuleNotFoundError(
        f"autoclip_torch needs {error.name}; install it with: "
        'pip install "autoclip-toolkit[torch]"',
        name=error.name,
    ) from error

from autoclip_core import __version__ as __version__

from .agreement import check_agreement as check_agreement
from .clipper import Clipper as Clipper
from .find_threshold import find_clipping_threshold as find_clipping_threshold
from .hooks.clipped_optimizer import ClippedOptimizer as ClippedOptimizer
from .named import AGC as AGC
from .named import AdaGC as AdaGC
from .named import NormClip as NormClip
from .named import QuantileClip as QuantileClip
from .named import StandardClip as StandardClip
from .named import ZClip as ZClip
from .trust import TrustClip as TrustClip
from .update import UpdateClipper as UpdateClipper
from .value import ValueClip as ValueClip
