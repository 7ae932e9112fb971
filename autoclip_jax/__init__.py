"""Adaptive gradient clipping for JAX; the optax transformations are yet to come."""

from autoclip_core import __version__ as __version__
