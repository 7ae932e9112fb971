"""Wrong uses, which a type checker refuses on each marked line; `test_typing.py`."""

import optax
import torch

from autoclip_core import ClipLog, MetricsLogger, Quantile, replay
from autoclip_jax import clip_by_policy, clip_by_quantile, skip_steps
from autoclip_tf import Clipper as KerasClipper
from autoclip_tf import QuantileClip as KerasQuantileClip
from autoclip_torch import Clipper, NormClip, QuantileClip, find_clipping_threshold

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
ClipLog(every="epoch")  # wrong
MetricsLogger(every=0.5)  # wrong
find_clipping_threshold(model, [], num_batches=3)  # wrong
QuantileClip.as_optimizer(model)  # wrong
skip_steps(optax.adam(1e-3), 0.99)  # wrong
clip_by_policy(Quantile(0.9), scope=1)  # wrong
KerasClipper(0.9)  # wrong
KerasQuantileClip(dry_run="yes")  # wrong
