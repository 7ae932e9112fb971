"""Adaptive gradient clipping for PyTorch: a clipper between backward and update."""

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
from .value import ValueClip as ValueClip
