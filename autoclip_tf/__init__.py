"""Adaptive gradient clipping for Keras and TensorFlow.

The package imports `autoclip_core`, `keras`, and `tensorflow` if that is the backend of
Keras. Read `clipper.py` first: `Clipper` is what the named clippers derive from.
"""

from autoclip_core import __version__ as __version__

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("keras", "tensorflow"):
        raise
    raise ModuleNotFoundError(
        f"autoclip_tf needs {error.name}; install it with: "
        'pip install "autoclip-toolkit[tf]"',
        name=error.name,
    ) from error

from . import optimizers as optimizers  # registers them, so that a file can be loaded
from .clipper import Clipper as Clipper
from .clippers import AGC as AGC
from .clippers import AdaGC as AdaGC
from .clippers import NormClip as NormClip
from .clippers import QuantileClip as QuantileClip
from .clippers import StandardClip as StandardClip
from .clippers import ZClip as ZClip
from .find_clippers import clippers_of as clippers_of
from .optimizers import with_gradient_transformers as with_gradient_transformers
from .trust import TrustClip as TrustClip
from .update import UpdateClipper as UpdateClipper
from .value import ValueClip as ValueClip
