"""Wrong uses. `make types` requires an error on each marked line.

mypy reports a `type: ignore` comment that is not needed, so each line is proved wrong.
"""

import optax
import torch

from autoclip_core import ClipLog, MetricsLogger, Quantile, replay
from autoclip_jax import clip_by_policy, clip_by_quantile, skip_steps
from autoclip_tf import Clipper as KerasClipper
from autoclip_tf import QuantileClip as KerasQuantileClip
from autoclip_torch import Clipper, NormClip, QuantileClip, find_clipping_threshold

model = torch.nn.Linear(2, 1)
Quantile("0.9")  # type: ignore[arg-type]
replay([1.0])  # type: ignore[call-arg]
QuantileClip(model, percentile=90)  # type: ignore[call-arg]
QuantileClip(model, scope=1)  # type: ignore[arg-type]
NormClip(model)  # type: ignore[call-arg]
norm: str = NormClip(model, max_norm=1.0).metrics()["clip/norm"]  # type: ignore[assignment]
Clipper(model)  # type: ignore[call-arg]
NormClip(model, 1.0, on_clip="print")  # type: ignore[arg-type]
KerasQuantileClip(quantile="0.9")  # type: ignore[arg-type]
clip_by_quantile(0.9, history_length="all")  # type: ignore[arg-type]
ClipLog(every="epoch")  # type: ignore[arg-type]
MetricsLogger(every=0.5)  # type: ignore[arg-type]
find_clipping_threshold(model, [], num_batches=3)  # type: ignore[call-arg]
QuantileClip.as_optimizer(model)  # type: ignore[arg-type]
skip_steps(optax.adam(1e-3), 0.99)  # type: ignore[arg-type]
clip_by_policy(Quantile(0.9), scope=1)  # type: ignore[arg-type]
KerasClipper(0.9)  # type: ignore[arg-type]
KerasQuantileClip(dry_run="yes")  # type: ignore[arg-type]
