"""The rules of other clippers, stated in Python floats, and the norms to compare on.

Each rule reads finite norms and yields the threshold and the scale of each step. The
threshold is +inf if the rule has none yet. None of these lines is copied: each states
what the other project documents or does.
"""

import math
import statistics
from collections import deque

import numpy as np

STEPS = 500
NOT_FINITE = {40: math.nan, 140: math.inf, 141: math.nan, 260: math.nan, 450: math.inf}
"""Steps whose norm is not finite."""


def series(rows=None, level=10.0, seed=17):
    """Return 500 norms with spikes, two changes of level, NaN and infinity.

    Args:
      rows: None for shape (500,), else the number of columns.
      level: the median of the first norms; far above the 1e-6 that others add.
      seed: that of the random numbers.
    """
    rng = np.random.default_rng(seed)
    shape = (STEPS,) if rows is None else (STEPS, rows)
    norms = level * np.exp(0.3 * rng.standard_normal(shape))
    norms[rng.random(shape) < 0.03] *= 30
    norms[200:] *= 4
    norms[400:] /= 10
    for step, norm in NOT_FINITE.items():
        norms[step] = norm
    return np.float32(norms)


def clip(norm, threshold):
    """Return the threshold and the scale of a clip, with 1e-6 in the divisor."""
    return threshold, threshold / (norm + 1e-6) if norm > threshold else 1.0


def drop(norm, threshold):
    """Return the threshold and the scale of a skipped step: 0."""
    return threshold, 0.0 if norm > threshold else 1.0


def fixed(norms, max_norm):
    """`clip_grad_norm_`, and every codebase that calls it with a constant."""
    for norm in norms:
        yield clip(norm, max_norm)


def autoclip_paper(norms, percentile, method="linear"):
    """pseeth/autoclip: the percentile of all norms, the current one included."""
    history = []
    for norm in norms:
        history.append(norm)
        yield clip(norm, float(np.percentile(history, percentile, method=method)))


def bitsandbytes(norms, percentile):
    """Entry `percentile` of 100 sorted squares; the first square fills all slots."""
    squares = []
    for step, norm in enumerate(norms, start=1):
        squares = squares or [norm * norm] * 100
        squares[step % 100] = norm * norm
        threshold = math.sqrt(sorted(squares)[percentile])
        yield threshold, min(1.0, threshold / norm)


def lelayf(norms):
    """The mean plus one deviation (n - 1) of the last 32 norms, once 32 are there."""
    past = deque(maxlen=32)
    for norm in norms:
        full = len(past) == 32
        level = statistics.fmean(past) + statistics.stdev(past) if full else math.inf
        yield clip(norm, level)
        past.append(norm)


def wellsaid(norms, window_size):
    """The median of the last norms; the first norm has no threshold."""
    past = deque(maxlen=window_size)
    for norm in norms:
        yield clip(norm, statistics.median(past) if past else math.inf)
        past.append(norm)


def levanter(norms, length=128, sigma=3.0):
    """The mean plus 3 deviations (n) of the last 128 norms, once 64 are there."""
    past = deque(maxlen=length)
    for norm in norms:
        level = math.inf
        if len(past) >= length // 2:
            deviation = max(float(np.std(past)), 1e-6)
            level = statistics.fmean(past) + sigma * deviation
        yield level, level / norm if norm > level else 1.0
        past.append(norm)


def skip_step(norms, length=128, sigma=6.0):
    """OLMo-core, norm half: skip above mean + 6 deviations of the last 128 norms.

    The rule starts when 64 norms are there. The current norm counts among these 64, but
    not in the mean. A skipped norm is kept, too.
    """
    past = deque(maxlen=length)
    for norm in norms:
        level = math.inf
        if len(past) + 1 >= length // 2:
            level = statistics.fmean(past) + sigma * statistics.stdev(past)
        yield drop(norm, level)
        past.append(norm)


def clip_and_skip(norms, max_norm, skip_above, eps=1e-6):
    """Megatron-LM, xtuner, axlearn: clip at a constant, skip above another one.

    xtuner and axlearn also skip a step whose norm is not finite.
    """
    for norm in norms:
        is_skipped = not norm <= skip_above
        scale = min(1.0, max_norm / (norm + eps))
        yield max_norm, 0.0 if is_skipped else scale


def adagc(norms, ratio=1.05, beta=0.98, warmup_steps=100, max_norm=1.0):
    """The AdaGC paper: the thresholds and scales of all tensors, for each step.

    In the warm-up the global norm is clipped at `max_norm`, and gamma is the smallest
    norm of the tensor after it.
    """
    gammas = [math.inf] * len(norms[0])
    for step, row in enumerate(norms):
        if step < warmup_steps:
            scale = min(1.0, max_norm / math.hypot(*row))
            scales, levels = [scale] * len(row), [math.inf] * len(row)
            gammas = [min(g, scale * n) for g, n in zip(gammas, row, strict=True)]
        else:
            levels = [ratio * gamma for gamma in gammas]
            scales = [min(1.0, t / n) for t, n in zip(levels, row, strict=True)]
            applied = [s * n for s, n in zip(scales, row, strict=True)]
            gammas = [
                beta * g + (1 - beta) * a for g, a in zip(gammas, applied, strict=True)
            ]
        yield levels, scales


def olmo_ratio(norms, ratio, beta):
    """OLMo's `max_grad_norm_ratio`: a multiple of the average of the clipped norm."""
    average = None
    for norm in norms:
        level = math.inf if average is None else ratio * average
        threshold, scale = clip(norm, level)
        applied = scale * norm
        average = applied if average is None else beta * average + (1 - beta) * applied
        yield threshold, scale


def lingvo(norms, decay=0.995, deviations=4.0, floor=0.01):
    """GradNormTracker: skip above 4 moving deviations of log(norm + 1).

    The moving sums start at 0 and are divided by their weight. Nothing is skipped until
    that weight exceeds 0.75. A norm above the threshold is recorded as the threshold.
    """
    weight = first = second = 0.0
    for norm in norms:
        value, cap = math.log(max(norm, floor) + 1.0), math.inf
        if weight > 0.75:
            mean = first / weight
            cap = mean + deviations * math.sqrt(max(second / weight - mean**2, 0.0))
        yield drop(norm, math.expm1(cap) if cap < 700 else math.inf)
        value = min(value, cap)
        weight = decay * weight + (1 - decay)
        first = decay * first + (1 - decay) * value
        second = decay * second + (1 - decay) * value * value


def composer_unit(gradient, weight, clipping):
    """Composer's adaptive rule for (outputs, ...): min(1, clipping * W / G), no eps."""
    axes = tuple(range(1, weight.ndim)) if weight.ndim > 1 else None
    norm = np.sqrt((gradient**2).sum(axis=axes, keepdims=True))
    limit = clipping * np.sqrt((weight**2).sum(axis=axes, keepdims=True))
    ratio = np.divide(limit, norm, out=np.ones_like(norm), where=norm > 0)
    return gradient * np.minimum(ratio, 1.0)


def jaychanhoi_unit(gradient, weight, clipping, eps):
    """JayChanHoi's rule: axis 0 of a matrix is summed, a kernel's axes after 0."""
    axes = {1: 0, 2: 0, 3: 0, 4: (1, 2, 3)}[weight.ndim]
    norm = np.sqrt((gradient**2).sum(axis=axes, keepdims=True))
    size = np.sqrt((weight**2).sum(axis=axes, keepdims=True))
    limit = clipping * np.maximum(size, eps)
    return np.where(norm > limit, gradient * limit / np.maximum(norm, 1e-8), gradient)


def olmo_core(values, length=128, sigma=6.0):
    """SkipStepOptimizer, for the losses or the norms: which values exceed their level.

    A value may be at most 6 deviations (n - 1) above the mean of the last 128 past
    values. The rule starts when 64 values are there, the current one included. The
    optimizer skips the step if its loss or its norm is above the level.
    """
    values = np.float64(values)
    is_above = np.zeros(len(values), bool)
    for step in range(length // 2 - 1, len(values)):
        past = values[max(0, step - length) : step]
        is_above[step] = values[step] - past.mean() > sigma * past.std(ddof=1)
    return is_above


def losses_and_norms(steps=5000, seed=21):
    """Return losses of both signs and norms, with spikes, and a few changes of level.

    No loss is close to its level, so that float32 and float64 decide alike.
    """
    rng = np.random.default_rng(seed)
    losses = 0.5 * rng.standard_normal(steps) + np.repeat(
        [1.0, -2.0, 0.0, 5.0], steps // 4
    )
    norms = 10 * np.exp(0.3 * rng.standard_normal(steps))
    losses[rng.random(steps) < 0.01] += 8
    norms[rng.random(steps) < 0.01] *= 30
    return np.float32(losses), np.float32(norms)
