"""One training run of the demo in JAX: `lax.scan` over the steps between two tests."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from autoclip_core import Fixed
from autoclip_jax import (
    clip_by_mean_std,
    clip_by_param_ratio,
    clip_by_policy,
    clip_by_quantile,
    clip_by_zscore,
    clip_metrics,
    trust_clip,
)
from demo_task import (
    BATCH,
    FIXED,
    HIDDEN,
    TEST_EVERY,
    WARMUP,
    Method,
    Run,
    initial_weights,
)
from digits_data import CLASSES, batches, load

NEVER = float(np.finfo(np.float32).max)
"""A threshold that no finite norm exceeds: it only observes."""


def make_optimizer(method: Method) -> optax.GradientTransformation:
    """Return plain SGD, whose rate rises in the warm-up, with the method's clipper."""
    rates = optax.linear_schedule(method.rate / WARMUP, method.rate, WARMUP - 1)
    if method.clipper == "trust":
        return trust_clip(optax.sgd(rates))
    return optax.chain(make_clipper(method), optax.sgd(rates))


def make_clipper(method: Method) -> optax.GradientTransformation:
    """Return the method's clipper of gradients; without clipping it only observes."""
    everything = {"nonfinite": "zero" if method.clips else "propagate"}
    whole = {"scope": "global", **everything}
    if not method.clips:
        return clip_by_policy(Fixed(NEVER), **whole)
    if method.clipper == "fixed":
        return clip_by_policy(Fixed(FIXED), **whole)
    if method.clipper == "quantile":
        return clip_by_quantile(0.9, **whole)
    if method.clipper == "median":
        return clip_by_quantile(0.5, **whole)
    if method.clipper == "mean_std":
        return clip_by_mean_std(2.0, **whole)
    if method.clipper == "agc":
        clip = clip_by_param_ratio(0.01, **everything)
        return optax.masked(clip, {"rnn": True, "head": False})  # as its paper does
    if method.clipper == "zclip":
        return clip_by_zscore(**whole)
    raise ValueError(f"the demo has no clipper for {method.clipper!r}")


def initial_params(seed: int) -> Any:
    """Return the weights, kernels of shape (from, to), where every framework starts."""
    start = initial_weights(seed)
    return {
        "rnn": {
            "inputs": {"kernel": jnp.asarray(start["inputs"])},
            "recurrent": {"kernel": jnp.asarray(start["recurrent"])},
            "bias": jnp.zeros(HIDDEN),
        },
        "head": {
            "kernel": jnp.asarray(start["outputs"]),
            "bias": jnp.zeros(CLASSES),
        },
    }


def logits_of(params: Any, x: Array) -> Array:
    """Read sequences of shape (images, steps, inputs) and weigh the digits."""
    rnn, head = params["rnn"], params["head"]

    def read(state: Array, part: Array) -> tuple[Array, None]:
        summed = part @ rnn["inputs"]["kernel"] + state @ rnn["recurrent"]["kernel"]
        return jax.nn.relu(summed + rnn["bias"]), None

    start = jnp.zeros((x.shape[0], HIDDEN))
    state, _ = jax.lax.scan(read, start, x.swapaxes(0, 1))
    return state @ head["kernel"] + head["bias"]


def loss_of(params: Any, x: Array, y: Array) -> Array:
    """Return the mean cross-entropy."""
    logits = logits_of(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@cache
def make_stretch(method: Method) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return jitted functions: the first carry, and several steps given their images.

    They are compiled once per method, for all its seeds in this process.
    """
    x, y, _, _ = map(jnp.asarray, load())
    tx = make_optimizer(method)

    def step(carry: tuple[Any, Any], batch: Array) -> Any:
        params, state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, x[batch], y[batch])
        updates, state = tx.update(grads, state, params)
        finite = jnp.isfinite(optax.global_norm(grads))
        params = optax.apply_updates(params, updates)
        return (params, state), (loss, finite, clip_metrics(state))

    def begin(params: Any) -> tuple[Any, Any]:
        return params, tx.init(params)

    return jax.jit(begin), jax.jit(partial(jax.lax.scan, step))


@jax.jit
def accuracy(params: Any, x: Array, y: Array) -> Array:
    """Return the fraction of images that are named rightly."""
    return (logits_of(params, x).argmax(1) == y).mean()


def train(method: Method, seed: int, steps: int) -> Run:
    """Train one network and return what happened."""
    test_x, test_y = map(jnp.asarray, load()[2:])
    begin, stretch = make_stretch(method)
    images = np.stack(list(batches(seed, steps, BATCH)))
    carry, records, accuracies = begin(initial_params(seed)), [], []
    for start in range(0, steps, TEST_EVERY):
        carry, record = stretch(carry, images[start : start + TEST_EVERY])
        records.append(jax.device_get(record))
        accuracies.append(float(accuracy(carry[0], test_x, test_y)))
    losses, finite, metrics = jax.tree.map(
        lambda *parts: np.concatenate(parts), *records
    )
    return Run(
        method,
        seed,
        losses=losses,
        norms=metrics["clip/norm"],
        thresholds=np.where(method.clips, metrics["clip/threshold"], np.inf),
        clipped=metrics["clip/clipped"],
        finite=finite,
        accuracies=np.array(accuracies),
    )
