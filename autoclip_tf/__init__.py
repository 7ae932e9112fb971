"""Adaptive gradient clipping for Keras; the gradient transformers are yet to come."""

from autoclip_core import __version__ as __version__
