"""What the public API promises to a type checker; `test_typing.py` has it read."""

from typing import assert_type

import jax
import numpy as np
import optax
import torch

from autoclip_core import (
    Cap,
    Decision,
    Quantile,
    Replay,
    Suggestion,
    decide,
    replay,
    suggest_threshold,
)
from autoclip_jax import clip_by_quantile, clip_metrics
from autoclip_tf import QuantileClip as KerasQuantileClip
from autoclip_torch import AGC, Clipper, QuantileClip

norms = np.ones(3, np.float32)
policy = Cap(Quantile(0.9, history_length=10), max_norm=1.0)
_, decision = decide(policy, policy.init(rows=3), norms)
assert_type(decision, Decision)
assert_type(replay(norms, policy), Replay)
assert_type(suggest_threshold(norms), Suggestion)

model = torch.nn.Linear(2, 1)
clipper = QuantileClip(model, quantile=0.9, scope="global", nonfinite="skip")
assert_type(clipper.step(), Decision)
assert_type(clipper.metrics(), dict[str, float])
assert_type(clipper.threshold(), torch.Tensor)
assert_type(clipper.names, list[str])
Clipper(model.named_parameters(), policy, scope="group")
AGC(model.parameters(), clipping=0.01, exclude="head")

assert_type(KerasQuantileClip(quantile=0.9).metrics(), dict[str, float])

assert_type(clip_by_quantile(0.9), optax.GradientTransformationExtraArgs)
assert_type(clip_metrics(()), dict[str, jax.Array])
