"""Wrong uses, which a type checker refuses on each marked line; `test_typing.py`."""

import torch

from autoclip_core import Quantile, replay
from autoclip_jax import clip_by_quantile
from autoclip_tf import QuantileClip as KerasQuantileClip
from autoclip_torch import Clipper, NormClip, QuantileClip

model = torch.nn.Linear(2, 1)
Quantile("0.9")  # wrong
replay([1.0])  # wrong
QuantileClip(model, percentile=90)  # wrong
QuantileClip(model, scope=1)  # wrong
NormClip(model)  # wrong
norm: str = NormClip(model, max_norm=1.0).metrics()["clip/norm"]  # wrong
Clipper(model)  # wrong
KerasQuantileClip(quantile="0.9")  # wrong
clip_by_quantile(0.9, history_length="all")  # wrong
