"""Adaptive gradient clipping for PyTorch: a clipper between backward and update."""

from autoclip_core import __version__ as __version__

from .agreement import check_agreement as check_agreement
from .clipper import Clipper as Clipper
from .clippers import AGC as AGC
from .clippers import AdaGC as AdaGC
from .clippers import NormClip as NormClip
from .clippers import QuantileClip as QuantileClip
from .clippers import StandardClip as StandardClip
from .clippers import ZClip as ZClip
from .find_threshold import find_clipping_threshold as find_clipping_threshold
from .optim import ClippedOptimizer as ClippedOptimizer
from .value import ValueClip as ValueClip
