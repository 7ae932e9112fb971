"""Adaptive gradient clipping for Keras and TensorFlow."""

from autoclip_core import __version__ as __version__

from . import optimizers as optimizers  # registers them, so that a file can be loaded
from .clipper import Clipper as Clipper
from .clippers import AGC as AGC
from .clippers import AdaGC as AdaGC
from .clippers import NormClip as NormClip
from .clippers import QuantileClip as QuantileClip
from .clippers import StandardClip as StandardClip
from .clippers import ZClip as ZClip
from .optimizers import with_gradient_transformers as with_gradient_transformers
from .value import ValueClip as ValueClip
