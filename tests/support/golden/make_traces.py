"""Write traces.json: the expected results of each policy for known series of norms.

This oracle is not a part of the library and imports nothing of it. It implements each
policy again, for one row, in float64, with lists and `if`, from its formula:

    Fixed              Pascanu, Mikolov, Bengio 2013, arXiv:1211.5063
    Quantile           AutoClip, Seetharaman et al. 2020, arXiv:2007.14469
    MeanStd            Chen et al. 2018, arXiv:1804.09849 (of logarithms, k = 4)
    ZScore             ZClip, Kumar et al. 2025, arXiv:2504.02507
    EmaRatio           AdaGC, Wang et al. 2025, arXiv:2502.11034
    ParamRatio         AGC, Brock et al. 2021, arXiv:2102.06171
    StreamingQuantile  Andrew et al. 2021, arXiv:1905.03871

A trace serves an implementation in float32. Therefore:

- Norms are exact float32 numbers, and a quantile is `np.quantile` of a float32 array.
- No norm lies so close to its threshold that rounding could decide whether it is
  clipped. A series with such a step is drawn again, from the next seed. Equality is
  allowed if it is exact in float32, too: the threshold is a past norm or a constant
  (order statistics, constant histories, fixed thresholds).
- A trace that float32 cannot hold is left out: a scale below its smallest normal
  number or a threshold above its largest, which only `tiny_and_huge` can reach
  (`too_extreme`). `UNDECIDED` lists cases that no seed can repair, and cases without
  information. The script prints what it left out, and why.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 240
SHORT = 60
TRACES = Path(__file__).parent / "traces.json"

Norms = list[float]
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)


# The policies. `limit` returns threshold and target for a norm, from the norms recorded
# before it. `learn` receives only finite norms above 0.


@dataclass
class Policy:
    """One row of a policy: the state is in the object."""

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        """Return threshold and target."""
        raise NotImplementedError

    def drop_level(self, norm: float, param_norm: float) -> float:
        """Return the norm above which a gradient is removed."""
        return math.inf

    def learn(self, norm: float) -> None:
        """Record a norm; a policy without a state does nothing."""


@dataclass
class Fixed(Policy):
    """A constant."""

    max_norm: float

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        return self.max_norm, self.max_norm


@dataclass
class Scheduled(Policy):
    """A threshold that is linear between given numbers of recorded norms."""

    points: list[tuple[int, float]]
    count: int = field(default=0, init=False)

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        steps, values = zip(*self.points, strict=True)
        threshold = float(np.interp(self.count, steps, values))
        return threshold, threshold

    def learn(self, norm: float) -> None:
        self.count += 1


@dataclass
class ParamRatio(Policy):
    """A constant times the norm of the parameters."""

    clipping: float = 0.01
    _: KW_ONLY
    eps: float = 1e-3

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        threshold = self.clipping * max(param_norm, self.eps)
        return threshold, threshold


def exp(value: float) -> float:
    """Return the exponential, +inf above the largest float."""
    return math.exp(value) if value < 709 else math.inf


def window(recorded: Norms, norm: float, current: bool, length: int | None) -> Norms:
    """Return the last norms; with `current`, also this norm if it can be recorded."""
    history = list(recorded)
    if current and math.isfinite(norm) and norm > 0:
        history.append(norm)
    return history if length is None else history[-length:]


@dataclass
class Quantile(Policy):
    """A quantile of the last norms before clipping."""

    quantile: float = 0.9
    _: KW_ONLY
    history_length: int | None = 1000
    include_current: bool = False
    recorded: Norms = field(default_factory=list, init=False)

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        last = window(self.recorded, norm, self.include_current, self.history_length)
        if not last:
            return math.inf, math.inf
        values = np.array(last, np.float32)
        # In an array q stays float64; NumPy before 2.4 rounds a plain one to float32.
        q = np.asarray(self.quantile)
        threshold = float(np.float32(np.quantile(values, q)))
        return threshold, threshold

    def learn(self, norm: float) -> None:
        self.recorded.append(norm)


@dataclass
class MeanStd(Policy):
    """Mean plus deviations of the last norms before clipping, or of their logs."""

    deviations: float = 2.0
    _: KW_ONLY
    history_length: int = 1000
    log: bool = False
    ddof: int = 1
    include_current: bool = False
    recorded: Norms = field(default_factory=list, init=False)

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        last = window(self.recorded, norm, self.include_current, self.history_length)
        if len(last) < max(2, self.ddof + 1):
            return math.inf, math.inf
        if self.log:
            last = [math.log(value) for value in last]
        mean = float(np.mean(last))
        std = float(np.std(last, ddof=self.ddof))
        threshold = mean + self.deviations * std
        if self.log:
            threshold = math.exp(threshold)
        return threshold, threshold

    def learn(self, norm: float) -> None:
        self.recorded.append(norm)


@dataclass
class ZScore(Policy):
    """Exponential mean plus z standard deviations, of the norms or of their logs."""

    z: float = 2.5
    _: KW_ONLY
    alpha: float = 0.97
    warmup_steps: int = 25
    target: str = "reciprocal"
    record: str = "winsorized"
    log: bool = False
    collected: Norms = field(default_factory=list, init=False)
    mean: float = field(default=math.nan, init=False)
    variance: float = field(default=math.nan, init=False)

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        if not self.log:
            return self.limit_value(norm)
        value = math.log(norm) if 0 < norm < math.inf else norm
        threshold, target = self.limit_value(value)
        return exp(threshold), exp(target)

    def limit_value(self, norm: float) -> tuple[float, float]:
        if len(self.collected) < max(1, self.warmup_steps):
            return math.inf, math.inf
        threshold = self.mean + self.z * math.sqrt(self.variance)
        if self.target == "threshold" or not norm > threshold:
            return threshold, threshold
        if self.target == "mean":
            return threshold, self.mean
        return threshold, self.mean + self.z**2 * self.variance / (norm - self.mean)

    def learn(self, norm: float) -> None:
        self.learn_value(math.log(norm) if self.log else norm)

    def learn_value(self, norm: float) -> None:
        if len(self.collected) < max(1, self.warmup_steps):
            self.collected.append(norm)
            self.mean = float(np.mean(self.collected))
            self.variance = float(np.var(self.collected))
            return
        threshold, target = self.limit_value(norm)
        learned = norm
        if norm > threshold:
            if self.record == "none":
                return
            if self.record == "applied":
                learned = target
            if self.record == "winsorized":
                # Not in the paper: the threshold must rise after constant norms.
                double = threshold + math.log(2) if self.log else 2 * threshold
                learned = min(norm, threshold if self.variance > 0 else double)
        # alpha·mean + (1 − alpha)·learned, written so that a constant stays constant.
        self.mean += (1 - self.alpha) * (learned - self.mean)
        self.variance = (
            self.alpha * self.variance + (1 - self.alpha) * (learned - self.mean) ** 2
        )


@dataclass
class EmaRatio(Policy):
    """A ratio to the exponential mean of the norms after clipping."""

    ratio: float = 1.05
    _: KW_ONLY
    beta: float = 0.98
    warmup_steps: int = 100
    warmup_threshold: float = 1.0
    count: int = field(default=0, init=False)
    gamma: float = field(default=math.inf, init=False)

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        threshold = self.ratio * self.gamma
        if self.count < self.warmup_steps:
            threshold = self.warmup_threshold
        return threshold, threshold

    def learn(self, norm: float) -> None:
        applied = min(norm, self.limit(norm, 0.0)[0])
        if self.count < max(1, self.warmup_steps):
            self.gamma = min(self.gamma, applied)
        else:
            self.gamma = self.beta * self.gamma + (1 - self.beta) * applied
        self.count += 1


@dataclass
class StreamingQuantile(Policy):
    """A quantile tracked in one number, which starts at the first norm."""

    quantile: float = 0.9
    _: KW_ONLY
    rate: float = 0.05
    level: float = field(default=math.inf, init=False)

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        return self.level, self.level

    def learn(self, norm: float) -> None:
        if self.level == math.inf:
            self.level = norm
            return
        below = 1 if norm <= self.level else 0
        self.level *= math.exp(-self.rate * (below - self.quantile))


# The combinators. The inner policy records against its own limit.


@dataclass
class Combinator(Policy):
    """A policy around another policy."""

    policy: Policy

    def drop_level(self, norm: float, param_norm: float) -> float:
        return self.policy.drop_level(norm, param_norm)

    def learn(self, norm: float) -> None:
        self.policy.learn(norm)


@dataclass
class Warmup(Combinator):
    """A constant until a number of norms have been recorded."""

    _: KW_ONLY
    steps: int
    threshold: float = math.inf
    count: int = field(default=0, init=False)

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        if self.count < self.steps:
            return self.threshold, self.threshold
        return self.policy.limit(norm, param_norm)

    def drop_level(self, norm: float, param_norm: float) -> float:
        if self.count < self.steps:
            return math.inf
        return self.policy.drop_level(norm, param_norm)

    def learn(self, norm: float) -> None:
        self.count += 1
        self.policy.learn(norm)


@dataclass
class Cap(Combinator):
    """A threshold that is never above a constant; the drop level may be above it."""

    _: KW_ONLY
    max_norm: float

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        threshold, target = self.policy.limit(norm, param_norm)
        return min(threshold, self.max_norm), min(target, self.max_norm)


@dataclass
class Floor(Combinator):
    """A threshold and a drop level that are never below a constant."""

    _: KW_ONLY
    min_norm: float

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        threshold, target = self.policy.limit(norm, param_norm)
        return max(threshold, self.min_norm), max(target, self.min_norm)

    def drop_level(self, norm: float, param_norm: float) -> float:
        return max(self.policy.drop_level(norm, param_norm), self.min_norm)


@dataclass
class Drop(Combinator):
    """A norm above the threshold is scaled to 0; below it, another policy may clip.

    On a single row, which is what a trace has, both actions give the same numbers.
    """

    _: KW_ONLY
    action: str = "zero"
    clip: Policy | None = None

    def limit(self, norm: float, param_norm: float) -> tuple[float, float]:
        if self.clip is None:
            return math.inf, math.inf
        return self.clip.limit(norm, param_norm)

    def drop_level(self, norm: float, param_norm: float) -> float:
        level = self.policy.limit(norm, param_norm)[0]
        policies = [self.policy] if self.clip is None else [self.policy, self.clip]
        return min([level, *(p.drop_level(norm, param_norm) for p in policies)])

    def learn(self, norm: float) -> None:
        self.policy.learn(norm)
        if self.clip is not None:
            self.clip.learn(norm)


STATELESS = [Fixed, Scheduled, ParamRatio]
STATEFUL = [Quantile, MeanStd, ZScore, EmaRatio, StreamingQuantile]
COMBINATORS = [Warmup, Cap, Floor, Drop]
NAMES = {policy.__name__: policy for policy in STATELESS + STATEFUL + COMBINATORS}


def evaluate(expression: str) -> Policy:
    """Return the policy of this file for an expression in the names of the library.

    Raises:
      NameError: this file has no formula of the policy; write it, and add it to NAMES.
    """
    policy: Policy = eval(expression, dict(NAMES))
    return policy


def run(
    policy: Policy, norms: Norms, param_norms: Norms | None = None
) -> tuple[Norms, Norms]:
    """Return thresholds and scales, one of each per step.

    The threshold of a step is the norm above which it is clipped or dropped.
    """
    clip_levels, drop_levels, scales = run_levels(policy, norms, param_norms)
    return list(map(min, clip_levels, drop_levels)), scales


def run_levels(
    policy: Policy, norms: Norms, param_norms: Norms | None = None
) -> tuple[Norms, Norms, Norms]:
    """Return the levels of clipping and of dropping, and the scales, one per step."""
    thresholds, drops, scales = [], [], []
    for norm, param_norm in zip(norms, param_norms or norms, strict=True):
        threshold, target = policy.limit(norm, param_norm)
        drop = policy.drop_level(norm, param_norm)
        if not math.isfinite(norm) or norm > drop:
            scale = 0.0
        elif norm > threshold:
            scale = target / norm
        else:
            scale = 1.0
        if math.isfinite(norm) and norm > 0:
            policy.learn(norm)
        thresholds.append(threshold)
        drops.append(drop)
        scales.append(scale)
    return thresholds, drops, scales


# The cases.

CASES: list[tuple[str, str | None]] = [
    ("Fixed(1.0)", None),
    ("Scheduled([(0, 4.0), (30, 0.3), (31, 2.2), (200, 0.85)])", None),
    ("Quantile(0.9)", None),
    ("Quantile(0.9, history_length=50)", None),
    ("Quantile(0.5, history_length=10)", None),
    ("Quantile(0.0, history_length=20)", None),
    ("Quantile(1.0, history_length=20)", None),
    ("Quantile(0.1, history_length=None, include_current=True)", None),
    ("Quantile(0.9, history_length=50, include_current=True)", None),
    ("MeanStd()", None),
    ("MeanStd(1.0, history_length=32)", None),
    ("MeanStd(4.0, history_length=100, log=True)", None),
    ("MeanStd(ddof=0)", None),
    ("MeanStd(include_current=True)", None),
    ("ZScore()", None),
    ("ZScore(target='reciprocal', record='applied')", None),
    ("ZScore(target='mean', record='applied')", None),
    ("ZScore(target='threshold', record='raw')", None),
    ("ZScore(record='none')", None),
    ("ZScore(warmup_steps=0)", None),
    ("ZScore(2.0, alpha=0.9, warmup_steps=5, target='threshold')", None),
    ("ZScore(4.0, alpha=0.99, warmup_steps=50, target='threshold', log=True)", None),
    ("ZScore(log=True)", None),
    ("ZScore(2.0, target='mean', record='applied', log=True)", None),
    ("EmaRatio()", None),
    ("EmaRatio(warmup_steps=0)", None),
    ("EmaRatio(2.0, warmup_steps=10)", None),
    ("StreamingQuantile(0.9)", None),
    ("StreamingQuantile(0.5, rate=0.2)", None),
    ("ParamRatio()", "ordinary"),
    ("ParamRatio()", "zero_initialised"),
    ("ParamRatio(0.16, eps=0.01)", "zero_initialised"),
    ("Warmup(Quantile(0.9, history_length=None), steps=100, threshold=1.0)", None),
    ("Warmup(ZScore(), steps=50)", None),
    ("Cap(Quantile(0.9), max_norm=1.0)", None),
    ("Warmup(EmaRatio(warmup_steps=0), steps=30, threshold=0.5)", None),
    ("Cap(ZScore(), max_norm=1.0)", None),
    ("Cap(ZScore(), max_norm=1.5)", None),
    ("Cap(EmaRatio(2.0, warmup_steps=10), max_norm=1.5)", None),
    ("Cap(Warmup(Quantile(0.9), steps=20), max_norm=2.0)", None),
    ("Floor(Quantile(0.9), min_norm=1.0)", None),
    ("Floor(ZScore(), min_norm=1.5)", None),
    ("Floor(Drop(Quantile(0.9)), min_norm=1.0)", None),
    ("Drop(Quantile(0.9), action='zero')", None),
    ("Drop(Quantile(0.9), action='skip')", None),
    ("Drop(EmaRatio(2.0, warmup_steps=10))", None),
    ("Cap(Drop(ZScore(), action='skip'), max_norm=1.0)", None),
    ("Drop(Quantile(0.9), clip=Fixed(1.0))", None),
    (
        "Drop(MeanStd(4.0, history_length=100, log=True),"
        " clip=Quantile(0.5, history_length=10))",
        None,
    ),
    (
        "Warmup(Drop(Quantile(0.9), clip=Quantile(0.5, history_length=10)),"
        " steps=30, threshold=1.5)",
        None,
    ),
    ("Floor(Drop(ZScore(), clip=StreamingQuantile(0.9)), min_norm=1.0)", None),
]
# The fixed thresholds of the cases, caps and floors included.
CONSTANTS = (0.5, 1.0, 1.5, 2.0)

REVISITS = "revisits its levels up to rounding"
LOGARITHM = "exp(log c) is c up to rounding"
UNDECIDED = {
    ("StreamingQuantile", "ties"): REVISITS,
    ("StreamingQuantile", "constant"): REVISITS,
    ("StreamingQuantile", "constant_then_shift"): REVISITS,
    ("log=True", "constant"): LOGARITHM,
    ("log=True", "constant_then_shift"): LOGARITHM,
    ("ParamRatio", "constant"): "looks at no history",
}


def log_normal(rng: np.random.Generator, log_std: float, steps: int = STEPS) -> Norms:
    """Norms around 1."""
    return [math.exp(log_std * rng.standard_normal()) for _ in range(steps)]


def shifted(rng: np.random.Generator, factor: float) -> Norms:
    """Norms around 1, and around `factor` in the second half."""
    norms = log_normal(rng, 0.3)
    return norms[: STEPS // 2] + [factor * norm for norm in norms[STEPS // 2 :]]


def spikes(rng: np.random.Generator) -> Norms:
    """One norm in twenty is fifty times as large."""
    return [
        norm * (50.0 if rng.random() < 0.05 else 1.0) for norm in log_normal(rng, 0.3)
    ]


def fp16_start(rng: np.random.Generator) -> Norms:
    """The start of a run in float16: the loss scale is too large at first."""
    return [math.inf, math.inf, 1.0, 1.0, *log_normal(rng, 0.3, STEPS - 4)]


def nan_in_the_middle(rng: np.random.Generator) -> Norms:
    """Some norms are not finite, single, in a row, and at the end."""
    norms = log_normal(rng, 0.3)
    for step in (10, 120, 122, 200, STEPS - 1):
        norms[step] = math.nan
    for step in (11, 60, 121, 123):
        norms[step] = math.inf
    return norms


def ties(rng: np.random.Generator) -> Norms:
    """A few levels with few binary digits, so that equality is exact."""
    return [float(rng.choice([0.5, 0.75, 1.0, 1.5, 2.0, 3.0])) for _ in range(STEPS)]


def zeros(rng: np.random.Generator) -> Norms:
    """Norms of exactly 0: at the start, in a row, and single."""
    norms = log_normal(rng, 0.3)
    return [
        0.0 if step < 3 or 100 <= step < 105 or rng.random() < 0.1 else norm
        for step, norm in enumerate(norms)
    ]


def constant(rng: np.random.Generator) -> Norms:
    """The same norm at every step."""
    return [3.0] * SHORT


def constant_then_shift(rng: np.random.Generator) -> Norms:
    """Constant norms, then ten times as much."""
    return [3.0] * 40 + [30.0 * norm for norm in log_normal(rng, 0.1, STEPS - 40)]


def tiny_and_huge(rng: np.random.Generator) -> Norms:
    """From 1e-20 to 1e20: neither square is a float32 number."""
    return [1.0, 1e20, 1e-20, *(10.0 ** rng.uniform(-20, 20, STEPS - 3))]


SERIES: dict[str, Callable[[np.random.Generator], Norms]] = {
    "steady": lambda rng: log_normal(rng, 0.1),
    "heavy_tailed": lambda rng: log_normal(rng, 1.0),
    "level_shift_up": lambda rng: shifted(rng, 10.0),
    "level_shift_down": lambda rng: shifted(rng, 0.1),
    "spikes": spikes,
    "fp16_start": fp16_start,
    "nan_in_the_middle": nan_in_the_middle,
    "ties": ties,
    "zeros": zeros,
    "constant": constant,
    "constant_then_shift": constant_then_shift,
    "tiny_and_huge": tiny_and_huge,
}


def zero_initialised() -> Norms:
    """Twenty steps of 0, then growth from below any eps to 200."""
    growth = np.geomspace(1e-4, 200.0, STEPS - 20)
    return [0.0] * 20 + [float(value) for value in growth]


PARAM_NORMS: dict[str, Norms] = {
    "ordinary": [100 * n for n in log_normal(np.random.default_rng(0), 0.5)],
    "zero_initialised": zero_initialised(),
}


# The limits of float32.


def tolerance(expression: str, series: str) -> float:
    """Return the allowed relative error of an implementation in float32.

    A half unit in the last place is 6e-8. A window does not accumulate errors. The
    streaming quantile, and AdaGC above its threshold, multiply their last value by one
    of a few factors. They accumulate the rounding errors of factor and product, five
    half units per step. The errors of the z-score decay at the rate 1 − alpha, which
    leaves 4e-6. They do not decay while it climbs, about 25 steps, and while it falls
    from 1e20, which takes the whole series.
    """
    steps = SHORT if series == "constant" else STEPS
    if "MeanStd" in expression:
        return 1e-5
    if "ZScore" in expression and series != "tiny_and_huge":
        return 2e-5
    if any(name in expression for name in ("ZScore", "EmaRatio", "StreamingQuantile")):
        return float(f"{steps * 3e-7:.2g}")
    return 1e-6


def near_tie(
    expression: str, norms: Norms, thresholds: Norms, rtol: float
) -> str | None:
    """Return the first step that rounding could decide, if any."""
    margin = max(2e-5, 2 * rtol)
    for step, (norm, threshold) in enumerate(zip(norms, thresholds, strict=True)):
        if not (math.isfinite(norm) and math.isfinite(threshold)):
            continue
        if norm == threshold:
            current = "include_current" in expression
            known = norms[: step + 1] if current else norms[:step]
            if threshold in CONSTANTS or threshold in known:
                continue
        if abs(norm - threshold) <= margin * threshold:
            return f"step {step}, norm {norm!r}, threshold {threshold!r}"
    return None


def too_extreme(thresholds: Norms, scales: Norms) -> str | None:
    """Return why float32 cannot hold the results, or None."""
    if any(LARGEST < threshold < math.inf for threshold in thresholds):
        return "a threshold is above the largest float32"
    if any(0 < threshold < SMALLEST for threshold in thresholds):
        return "a threshold is below the smallest normal float32"
    if any(0 < scale < SMALLEST for scale in scales):
        return "a scale is below the smallest normal float32"
    return None


def undecided(expression: str, series: str) -> str | None:
    """Return why a case gives no information on a series, or None."""
    for (part, name), reason in UNDECIDED.items():
        if part in expression and name == series:
            return reason
    return None


# The file.


def float32(values: Norms) -> Norms:
    """Return the nearest float32 numbers."""
    return [float(np.float32(value)) for value in values]


def nine_digits(values: Norms) -> Norms:
    """Return the values with nine digits, which distinguish float32 numbers."""
    return [float(f"{value:.9g}") for value in values]


def traces_of(series: str, norms: Norms) -> Iterator[dict[str, Any]]:
    """Yield one trace per case; a case that is left out holds the reason instead."""
    for expression, of_params in CASES:
        trace: dict[str, Any] = {"policy": expression, "series": series}
        if of_params is not None:
            trace["param_norms"] = of_params
        trace["left_out"] = undecided(expression, series)
        if trace["left_out"] is None:
            param_norms = PARAM_NORMS[of_params] if of_params else None
            clip, drop, scales = run_levels(evaluate(expression), norms, param_norms)
            thresholds = list(map(min, clip, drop))
            trace["left_out"] = too_extreme(thresholds, scales)
            rtol = tolerance(expression, series)
            near = [near_tie(expression, norms, level, rtol) for level in (clip, drop)]
            trace["near_tie"] = near[0] or near[1]
            trace["rtol"] = rtol
            trace["thresholds"] = nine_digits(thresholds)
            trace["scales"] = nine_digits(scales)
        yield trace


def draw(series: str) -> tuple[Norms, list[dict[str, Any]]]:
    """Return the series of the first seed without a near tie, and its traces."""
    for seed in range(1000):
        rng = np.random.default_rng([seed, list(SERIES).index(series)])
        norms = float32(SERIES[series](rng))
        traces = list(traces_of(series, norms))
        kept = [trace for trace in traces if trace["left_out"] is None]
        near = [trace for trace in kept if trace["near_tie"] is not None]
        if not near:
            print(f"{series}: seed {seed}, {len(kept)} traces")
            for trace in traces:
                if trace["left_out"] is not None:
                    print(f"    left out {trace['policy']}: {trace['left_out']}")
            return norms, kept
        print(f"{series}: not seed {seed}, near tie of {near[0]['policy']}")
        print(f"    {near[0]['near_tie']}")
    raise RuntimeError(f"no seed gives {series} without a near tie")


def one_per_line(items: list[str]) -> str:
    return ",\n".join(items)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def write() -> None:
    """Draw every series and write the file, one series or trace per line."""
    series: list[str] = []
    traces: list[str] = []
    for name in SERIES:
        norms, kept = draw(name)
        series.append(f"{compact(name)}:{compact(norms)}")
        for trace in kept:
            del trace["left_out"], trace["near_tie"]
            traces.append(compact(trace))
    params = [f"{compact(name)}:{compact(n)}" for name, n in PARAM_NORMS.items()]
    TRACES.write_text(
        '{"format":1,\n'
        f'"series":{{\n{one_per_line(series)}}},\n'
        f'"param_norms":{{\n{one_per_line(params)}}},\n'
        f'"traces":[\n{one_per_line(traces)}]}}\n'
    )
    print(f"{len(traces)} traces, {TRACES.stat().st_size / 1e6:.2f} MB")


# Calculations by hand.


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-7)


def check_by_hand() -> None:
    """Compare the policies with calculations by hand."""
    # Of 0 … 31 the mean is 15.5 and, with 31 in the divisor, the standard deviation
    # √(32·33/12) = 9.3808315. A norm of 0 is not recorded, hence 1 … 32.
    norms = [float(n) for n in range(1, 33)]
    std = math.sqrt(32 * 33 / 12)
    thresholds, scales = run(evaluate("MeanStd(1.0)"), [0.0, *norms, 50.0])
    assert close(std, 9.3808315)
    assert thresholds[:3] == [math.inf] * 3
    assert close(thresholds[-1], 16.5 + std)
    assert close(scales[-1], (16.5 + std) / 50)
    assert scales[0] == 1

    # Between 2 and 3 at the rank 0.9 · 2 = 1.8: 2.8. Then the window is 2, 3, 10.
    norms = [1.0, 2.0, 3.0, 10.0, 7.5, math.nan, 8.5]
    thresholds, scales = run(evaluate("Quantile(0.9, history_length=3)"), norms)
    assert close(thresholds[3], 2.8)
    assert close(scales[3], 0.28)
    assert close(thresholds[4], 3 + 0.8 * 7)
    assert scales[4] == 1
    assert close(thresholds[5], 7.5 + 0.8 * 2.5)  # 3, 10, 7.5, and the nan is not in
    assert scales[5] == 0
    assert thresholds[6] == thresholds[5]

    # Of 1 and 3 the mean is 2 and the variance 1: T = 2 + 2.5 · 1, and the norm 10 is
    # at z = 8: R = 2 + 2.5²/8. Winsorized, 4.5 is learned: the mean is 2.075 and the
    # variance 0.97 + 0.03 · 2.425².
    policy = evaluate("ZScore(warmup_steps=2)")
    thresholds, scales = run(policy, [1.0, 3.0, 10.0, 1.0])
    assert thresholds[:3] == [math.inf, math.inf, 4.5]
    assert close(scales[2], 0.278125)
    assert close(thresholds[3], 2.075 + 2.5 * math.sqrt(0.97 + 0.03 * 2.425**2))

    # A constant history: T = 3, and twice as much is learned of 30: the mean is 3.09
    # and the variance 0.03 · 2.91².
    thresholds, scales = run(evaluate("ZScore(warmup_steps=3)"), [3.0] * 4 + [30.0] * 2)
    assert thresholds[3:5] == [3.0, 3.0]
    assert close(thresholds[5], 3.09 + 2.5 * math.sqrt(0.03 * 2.91**2))
    assert scales[:4] == [1.0] * 4
    assert close(scales[4], 0.1)

    # Of 1 and e² the mean logarithm is 1, and its variance 1: T = e^3. The norm e⁵
    # is at z = 4: R = e^(1 + 2²/4). T is learned: μ = 1.06, σ² = 0.97 + 0.03·1.94².
    policy = evaluate("ZScore(2.0, warmup_steps=2, log=True)")
    thresholds, scales = run(policy, [1.0, math.exp(2), math.exp(5), 1.0])
    assert close(thresholds[2], math.exp(3))
    assert close(scales[2], math.exp(-3))
    sigma = math.sqrt(0.97 + 0.03 * 1.94**2)
    assert close(thresholds[3], math.exp(1.06 + 2 * sigma))

    # Both warm-up norms are limited to 1, and γ is the smaller, 0.5. Then T = 2γ = 1,
    # 1 is applied, and γ = (0.5 + 1)/2.
    policy = evaluate("EmaRatio(2.0, beta=0.5, warmup_steps=2)")
    thresholds, scales = run(policy, [0.5, 4.0, 4.0, 4.0])
    assert thresholds == [1.0, 1.0, 1.0, 1.5]
    assert scales == [1.0, 0.25, 0.25, 0.375]

    # C = 2; 1 is below: C = 2·exp(−0.1); 5 is above: C = 2 again.
    policy = evaluate("StreamingQuantile(0.5, rate=0.2)")
    thresholds, _ = run(policy, [2.0, 1.0, 5.0, 1.0])
    assert thresholds[:2] == [math.inf, 2.0]
    assert close(thresholds[2], 1.809674836)
    assert close(thresholds[3], 2.0)

    # The rate at which C was exceeded is (1 − q) + ln(C_T/C_0)/(ηT), for any series.
    norms = log_normal(np.random.default_rng(1), 1.0)
    thresholds, scales = run(evaluate("StreamingQuantile(0.8)"), norms)
    exceeded = sum(scale < 1 for scale in scales[1:-1]) / (STEPS - 2)
    drift = math.log(thresholds[-1] / thresholds[1]) / (0.05 * (STEPS - 2))
    assert close(exceeded, 0.2 + drift)

    # A parameter of 0 counts as eps: 0.01 · 0.001, and 0.01 · 50.
    thresholds, scales = run(evaluate("ParamRatio()"), [1.0, 2.0], [0.0, 50.0])
    assert close(thresholds[0], 1e-5)
    assert close(scales[1], 0.25)

    # Half-way from 4 to 1 it is 2.5. A norm of 0 does not count.
    policy = evaluate("Scheduled([(1, 4.0), (3, 1.0)])")
    thresholds, _ = run(policy, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert thresholds == [4.0, 4.0, 4.0, 2.5, 1.0, 1.0]

    # Under a cap of 1 the quantile still learns 4 and 6, and is 5 where it is seen.
    norms = [4.0, 6.0, 8.0]
    thresholds, scales = run(evaluate("Cap(Quantile(0.5), max_norm=1.0)"), norms)
    assert thresholds == [1.0, 1.0, 1.0]
    assert scales == [0.25, 1 / 6, 0.125]
    thresholds, _ = run(evaluate("Warmup(Quantile(0.5), steps=2, threshold=2)"), norms)
    assert thresholds == [2.0, 2.0, 5.0]
    policy = evaluate("Floor(Drop(Quantile(0.5)), min_norm=5.5)")
    thresholds, scales = run(policy, norms)
    assert thresholds == [math.inf, 5.5, 5.5]
    assert scales == [1.0, 0.0, 0.0]

    # The medians 4 and 5 drop 6 and 8. A cap of 4.5 does not change that; it clips 4.8,
    # which the median of 4, 6, 8 lets pass.
    norms = [4.0, 6.0, 8.0, 4.8]
    for expression in (
        "Cap(Drop(Quantile(0.5)), max_norm=4.5)",
        "Drop(Quantile(0.5), clip=Fixed(4.5))",
    ):
        clip, drop, scales = run_levels(evaluate(expression), norms)
        assert clip == [4.5] * 4
        assert drop == [math.inf, 4.0, 5.0, 6.0]
        assert scales == [1.0, 0.0, 0.0, 4.5 / 4.8]

    # In the warm-up nothing is dropped, and both policies record.
    policy = evaluate(
        "Warmup(Drop(Quantile(0.5), clip=Quantile(0.0)), steps=2, threshold=3.0)"
    )
    thresholds, scales = run(policy, [4.0, 6.0, 4.5, 9.0])
    assert thresholds == [3.0, 3.0, 4.0, 4.0]
    assert scales == [0.75, 0.5, 4.0 / 4.5, 0.0]


if __name__ == "__main__":
    check_by_hand()
    write()
