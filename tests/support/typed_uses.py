"""The types that the public names promise. `make types` checks this file."""

from typing import assert_type

import jax
import numpy as np
import optax
import torch

from autoclip_core import (
    Cap,
    ClipLog,
    Decision,
    MetricsLogger,
    Quantile,
    Replay,
    Suggestion,
    decide,
    replay,
    suggest_threshold,
)
from autoclip_core.log.summary import Summary
from autoclip_jax import (
    check_skips,
    clip_by_policy,
    clip_by_quantile,
    clip_metrics,
    row_names,
    skip_steps,
    trust_clip,
)
from autoclip_tf import Clipper as KerasClipper
from autoclip_tf import QuantileClip as KerasQuantileClip
from autoclip_tf import clippers_of
from autoclip_tf.callbacks import ClipLogger
from autoclip_tf.find_clippers import AnyClipper
from autoclip_torch import (
    AGC,
    ClippedOptimizer,
    Clipper,
    QuantileClip,
    TrustClip,
    ValueClip,
    find_clipping_threshold,
)
from autoclip_torch.hooks.clipper_chain import Attachment
from autoclip_torch.lightning import ClipCallback as LightningCallback
from autoclip_torch.optim import LARC
from autoclip_torch.transformers import ClipCallback as TrainerCallback

norms = np.ones(3, np.float32)
policy = Cap(Quantile(0.9, history_length=10), max_norm=1.0)
_, decision = decide(policy, policy.init(rows=3), norms)
assert_type(decision, Decision)
assert_type(replay(norms, policy), Replay)
assert_type(suggest_threshold(norms), Suggestion)

log = ClipLog(["a", "b"], every=50, settings={"policy": repr(policy)})
log.record(decision)
log.record(norm=1.0, threshold=2.0)
assert_type(log.summary(), Summary)
send = MetricsLogger(log, print, every=10)

model = torch.nn.Linear(2, 1)
clipper = QuantileClip(model, quantile=0.9, scope="global", nonfinite="skip")
assert_type(clipper.step(), Decision)
assert_type(clipper.metrics(), dict[str, float])
assert_type(clipper.threshold(), torch.Tensor)
assert_type(clipper.names, list[str])
Clipper(model.named_parameters(), policy, scope="group")
AGC(model.parameters(), 0.01, exclude="head")
AGC(model.parameters(), 0.01, scale_only=["*.head.*"])
ValueClip(model, 0.5).step()
send(clipper.metrics)


def look(decision: Decision, names: list[str], step: int) -> None:
    """Print the row of the largest norm."""
    print(step, names[int(decision.norm.argmax())])


clipper.on_clip = clipper.on_skip = look
QuantileClip(model, 0.9, on_clip=look, on_skip=print)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
assert_type(clipper.attach(optimizer), Attachment)
assert_type(QuantileClip.as_optimizer(optimizer, 0.9), ClippedOptimizer)
both = TrustClip(model, optimizer, ratio=0.02, exclude="bias")
assert_type(both.metrics(per_row=True), dict[str, float])
assert_type(TrustClip.as_optimizer(optimizer, model=model), ClippedOptimizer)
LARC(optimizer, 0.02, model=model, exclude="bias").step()
TrainerCallback(TrustClip)
LightningCallback(TrustClip, ratio=0.05)
batches = [(torch.ones(1, 2), torch.ones(1, 1))]
loss = torch.nn.functional.mse_loss
assert_type(find_clipping_threshold(model, batches, loss, num_batches=1), Suggestion)
LightningCallback(QuantileClip, quantile=0.9)
TrainerCallback(Clipper, policy=policy, scope="global")

keras_clip = KerasQuantileClip(quantile=0.9, scope="global", max_threshold=10.0)
assert_type(keras_clip.metrics(), dict[str, float])
assert_type(keras_clip.decision, Decision)
KerasClipper(policy, exclude="head", scale_only="body", dry_run=True)
ClipLogger()
ClipLogger([keras_clip])
assert_type(clippers_of(None), list[AnyClipper])

assert_type(clip_by_quantile(0.9), optax.GradientTransformationExtraArgs)
assert_type(clip_metrics(()), dict[str, jax.Array])
assert_type(row_names((), scope="unit"), list[str])
clip_metrics((), row_names((), labels={"bias": 1}))
clip_by_policy(policy, scope="global", axis_name="data")
skipping = skip_steps(optax.adam(1e-3), policy, max_consecutive=5)
assert_type(skipping, optax.GradientTransformationExtraArgs)
assert_type(trust_clip(optax.sgd(0.1)), optax.GradientTransformationExtraArgs)
trust_clip(optax.adam(1e-3), ratio=0.05, scope="unit", exclude={"bias": True})
check_skips(())
