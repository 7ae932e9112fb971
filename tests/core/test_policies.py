"""Each policy: its formula, its behaviour as an object, and its namespace."""

import copy
import itertools
import math
import operator
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from autoclip_core import (
    Cap,
    Decision,
    Drop,
    EmaRatio,
    Fixed,
    MeanStd,
    Policy,
    Quantile,
    Scheduled,
    StreamingQuantile,
    Warmup,
    ZScore,
    decide,
)
from autoclip_core.history.validation import find_problems
from autoclip_core.policies.param_ratio import TrustRatio
from autoclip_core.policy import NAMESPACE_NAMES, as_code, get_arguments

from ..support.cases import (
    POLICIES,
    STATIC,
    assert_same,
    cut,
    each,
    every_policy,
    leaves,
    linear_quantile,
    log_normal,
    parity_series,
    policy_of,
    run,
    series_of,
)
from ..support.traces import oracle

# The formulas, by an independent program (tests/support/golden/make_traces.py).


def troubled(seed, steps=150):
    """Return norms with NaN, zeros and spikes; odd seeds are heavy-tailed."""
    rng = np.random.default_rng(seed)
    norms = log_normal(rng, steps, 1.0 if seed % 2 else 0.3)
    norms[rng.random(steps) < 0.05] = np.nan
    norms[rng.random(steps) < 0.05] = 0
    norms[rng.random(steps) < 0.03] *= 100
    return np.float32(norms * 10.0 ** rng.integers(-3, 3))


@pytest.mark.parametrize("code", POLICIES)
def test_the_formula_is_that_of_the_oracle(code):
    """The test compares each row up to the first step that rounding could decide."""
    rows = [troubled(seed) for seed in range(6)]
    param_norms = np.float32(10 * log_normal(np.random.default_rng(9), (150, 6)))
    series = series_of(np.transpose(rows), param_norms=param_norms)
    _, decision = run(POLICIES[code], series)
    compared = 0
    for row, norms in enumerate(series.norms.T):
        policy = oracle().evaluate(code)
        thresholds, scales = oracle().run(
            policy, norms.tolist(), param_norms[:, row].tolist()
        )
        if "skip" in code:  # a row that is dropped takes the others along
            scales = np.where(decision.skipped[:, row], 0, scales)
        end = first_tie(norms, thresholds)
        close = {"rtol": 1e-6 if "Quantile(" in code else 1e-5}
        np.testing.assert_allclose(
            decision.threshold[:end, row], thresholds[:end], **close
        )
        np.testing.assert_allclose(decision.scale[:end, row], scales[:end], **close)
        compared += end
    assert compared > 300, "choose other seeds"


def first_tie(norms, thresholds):
    """Return the first step in which rounding decides whether a norm is clipped."""
    for step, (norm, threshold) in enumerate(zip(norms, thresholds, strict=True)):
        if norm != threshold and math.isclose(norm, threshold, rel_tol=2e-5):
            return step
    return len(norms)


# All history, against NumPy over a Python list.


def growing_lists(norms):
    """Yield, for each step, the finite, positive norms of each row up to this step."""
    kept = [[] for _ in norms[0]]
    for row_norms in norms:
        for row, norm in enumerate(row_norms):
            if np.isfinite(norm) and norm > 0:
                kept[row].append(norm)
        yield [list(row) for row in kept]


@pytest.fixture(scope="module")
def long_series():
    """Return four rows: steady, sometimes not finite, sometimes idle, and late."""
    rng = np.random.default_rng(8)
    norms = np.float32(log_normal(rng, (300, 4), 0.7))
    norms[rng.random(300) < 0.2, 1] = np.nan
    norms[rng.random(300) < 0.1, 1] = np.inf
    norms[rng.random(300) < 0.3, 2] = 0
    norms[:200, 3] = 0
    return norms


def test_the_autoclip_paper(long_series):
    """The tenth percentile of all norms so far, the current one included."""
    policy = Quantile(0.1, history_length=None, include_current=True)
    _, decision = run(policy, series_of(long_series))
    for step, rows in enumerate(growing_lists(long_series)):
        expected = [linear_quantile(row, 0.1) if row else np.inf for row in rows]
        np.testing.assert_array_equal(decision.threshold[step], np.float32(expected))
        assert [decision.clipped[step, 0]] == [long_series[step, 0] > expected[0]]


def test_percentile_ninety_of_all_history_after_a_hundred_steps(long_series):
    policy = Warmup(Quantile(0.9, history_length=None), steps=100, threshold=1.0)
    _, decision = run(policy, series_of(long_series))
    before = [[[] for _ in range(4)], *growing_lists(long_series)]
    for step, rows in enumerate(before[:-1]):
        expected = [
            linear_quantile(row, 0.9) if len(row) >= 100 else 1.0 for row in rows
        ]
        np.testing.assert_array_equal(decision.threshold[step], np.float32(expected))
    assert decision.threshold[-1].tolist().count(1.0) == 1  # only the late row


@pytest.mark.parametrize("log", [False, True])
def test_mean_and_deviations_of_all_history(long_series, log):
    policy = MeanStd(1.5, history_length=None, log=log)
    _, decision = run(policy, series_of(long_series))
    before = [[[] for _ in range(4)], *growing_lists(long_series)]
    for step, rows in enumerate(before[:-1]):
        for row, norms in enumerate(rows):
            expected = np.inf
            if len(norms) >= 2:
                values = np.log(np.float64(norms)) if log else np.float64(norms)
                expected = values.mean() + 1.5 * values.std(ddof=1)
                expected = math.exp(expected) if log else expected
            assert decision.threshold[step, row] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "inner", [Quantile(0.8, history_length=7), MeanStd(1.0, history_length=7)]
)
def test_a_window_longer_than_the_run_is_all_history(inner):
    norms = log_normal(np.random.default_rng(0), (70, 2))
    _, windowed = run(replace(inner, history_length=70), series_of(norms))
    _, whole = run(replace(inner, history_length=None), series_of(norms))
    np.testing.assert_allclose(windowed.threshold, whole.threshold, rtol=1e-6)


@pytest.mark.parametrize("code", [c for c in POLICIES if c not in STATIC])
def test_all_history_is_for_the_host_only(code):
    with pytest.raises(ValueError, match="history_length must be a number") as refused:
        POLICIES[code].init(2, SealedNamespace())
    assert "set history_length=1000, or use StreamingQuantile" in str(refused.value)


# One step at a time: things that a formula does not say.


@pytest.mark.parametrize("log", [False, True])
def test_zscore_reciprocal_never_exceeds_its_threshold(log):
    """R/n would amplify if rounding put R above T, and n is the next float above T."""
    rng = np.random.default_rng(0)
    policy = ZScore(2.5, warmup_steps=1, log=log)
    rows = 200_000
    mean = np.float32(rng.random(rows) * 10.0 ** rng.integers(-6, 1, rows))
    deviation = np.float32(rng.random(rows))
    state = type(policy.init(1))(mean, deviation, np.ones(rows, np.int32))
    threshold = policy.limit(state).threshold
    norms = threshold
    for _ in range(3):
        norms = np.nextafter(norms, np.float32(np.inf))
        limit = policy.limit(state, norms)
        assert (limit.target <= threshold).all()
        _, decision = decide(policy, state, norms)
        assert decision.clipped.all()
        assert (decision.scale <= 1).all()


def test_a_combination_of_tiny_and_huge_norms_warns_of_nothing():
    """NumPy would warn about an overflow in a branch that `where` discards."""
    norms = np.float32([1, 1e20, 1e-20, 1.2e-38, 3.4e38, 1, 3.3e38, 1e-30, 2] * 4)
    for policy in POLICIES.values():
        _, decision = run(policy, series_of(np.stack([norms, norms[::-1]], axis=1)))
        assert not np.isnan(decision.threshold).any()
        assert ((decision.scale >= 0) & (decision.scale <= 1)).all()


def test_a_norm_at_the_threshold_is_recorded_and_one_above_it_is_not():
    policy = ZScore(2.0, warmup_steps=3, record="none")
    state, _ = run(policy, series_of([1, 2, 3]))
    threshold = policy.limit(state).threshold
    after, _ = decide(policy, state, threshold)
    assert after.mean[0] == pytest.approx(2 + 0.03 * (threshold[0] - 2))
    after, _ = decide(policy, state, np.nextafter(threshold, np.float32(9)))
    assert_same(after, state)


def test_a_row_that_wakes_late_is_not_frozen():
    """The paper takes the minimum of the warm-up, which is 0 for an idle row."""
    norms = np.ones((60, 2))
    norms[:30, 1] = 0
    for policy in (EmaRatio(2.0, warmup_steps=10), EmaRatio(2.0, warmup_steps=0)):
        _, decision = run(policy, series_of(norms))
        assert (decision.scale == 1).all()
        assert decision.threshold[-1].tolist() == [2.0, 2.0]


def test_the_speed_limit_of_adagc():
    """gamma rises by at most (1 - beta) * (ratio - 1) a step."""
    policy = EmaRatio(1.05, beta=0.98, warmup_steps=0)
    _, decision = run(policy, series_of([1.0] + [1e6] * 200))
    growth = decision.threshold[2:, 0] / decision.threshold[1:-1, 0]
    assert growth == pytest.approx([1 + 0.02 * 0.05] * len(growth), rel=1e-6)


def test_a_constant_threshold_before_the_norms_is_one_number():
    policy = Fixed(2.0)
    assert [field.tolist() for field in policy.limit(policy.init(3))[:2]] == [[2.0]] * 2


def test_a_schedule_stops_counting_at_its_last_point():
    state, _ = run(Scheduled([(0, 2.0), (3, 1.0)]), series_of(np.ones(8)))
    assert state.count.tolist() == [3]


def test_a_memory_of_nothing_is_the_last_norm():
    """alpha = 0 and beta = 0: the average is what was recorded last."""
    policy = ZScore(2.0, alpha=0, warmup_steps=2)
    _, decision = run(policy, series_of([1, 3, 3.5, 10, 20, 2, 1]))
    # After 1 and 3: 2 + 2 * 1. Then sigma is 0, and T at most doubles.
    assert decision.threshold[2:, 0].tolist() == [4, 3.5, 7, 14, 2]
    _, decision = run(EmaRatio(2.0, beta=0, warmup_steps=0), series_of([1, 3, 9, 1, 1]))
    assert decision.threshold[1:, 0].tolist() == [2, 4, 8, 2]


TINY, HUGE = np.float32(1.2e-38), np.float32(3e38)


@pytest.mark.parametrize(
    "policy",
    [
        *(EmaRatio(2.0, beta=b, warmup_steps=0) for b in (0, 1e-9, 1e-7)),
        *(ZScore(2.0, alpha=a, warmup_steps=0) for a in (0, 1e-9)),
        ZScore(2.0, alpha=1e-7, warmup_steps=0, record="raw"),
        ZScore(2.0, alpha=0, warmup_steps=0, log=True),
        ZScore(2.0, alpha=0, warmup_steps=3, record="raw"),
        *(StreamingQuantile(q, rate=r) for q in (0.0, 1.0) for r in (20, 1000)),
        StreamingQuantile(0.5, rate=1.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("level", [TINY, HUGE])
def test_no_row_is_frozen_by_a_large_fall_or_rise(policy, level):
    """1e30 + (1 - 1e30) is 0 in float32: such an average never changed again."""
    norms = np.float32([1, 1, 1, HUGE, TINY, HUGE, TINY, *[level] * 260])
    state, decision = run(policy, series_of(norms))
    assert list(find_problems(state, "state")) == []
    assert (decision.threshold[1:] > 0).all()
    if not isinstance(policy, StreamingQuantile):
        assert state.mean[0] == pytest.approx(level, rel=1e-6)


def test_an_average_without_a_past_is_its_last_value_exactly():
    values = np.float32([3e30, 7.1, 1e-30, 0.3, 2e20])
    for value, other in itertools.permutations(values, 2):
        norms = series_of([value, other])
        if float(other) < 1e36 * float(value):  # it is not clipped
            state, _ = run(EmaRatio(1e37, beta=0, warmup_steps=0), norms)
            assert state.mean[0] == other
        state, _ = run(ZScore(alpha=0, warmup_steps=0, record="raw"), norms)
        assert (state.mean[0], state.deviation[0]) == (other, 0)


@pytest.mark.parametrize("history_length", [2, 100, None])
@pytest.mark.parametrize(
    "norms", [[TINY, HUGE], [TINY, 1], [1, HUGE], [TINY] * 9 + [HUGE] * 2], ids=str
)
def test_a_threshold_from_logarithms_saturates_in_float32(norms, history_length):
    """The exponential of the deviation may overflow, although the threshold is small,
    and the threshold is never 0 or infinite."""
    for k in (-1e30, -5.0, -1.0, 0.3, 1.0, 5.0, 1e30):
        policy = MeanStd(k, history_length=history_length, log=True)
        state, _ = run(policy, series_of(norms))
        last = np.log(np.float64(norms[-(history_length or 100) :]))
        exact = last.mean() + k * last.std(ddof=1)
        bounds = np.log(np.finfo(np.float32).tiny), np.log(np.finfo(np.float32).max)
        threshold = policy.limit(state).threshold
        assert np.isfinite(threshold).all()
        expected = pytest.approx(np.clip(exact, *bounds), abs=2e-3)
        assert np.log(np.float64(threshold[0])) == expected


def test_a_score_of_logarithms_saturates_in_float32():
    policy = ZScore(4.0, alpha=0.5, warmup_steps=2, record="raw", log=True)
    state, _ = run(policy, series_of([TINY, HUGE]))
    threshold = policy.limit(state).threshold
    assert threshold[0] == pytest.approx(np.finfo(np.float32).max, rel=2e-3)
    assert np.isfinite(threshold).all()


def test_logarithms_reach_over_the_whole_range_of_float32():
    """A ratio of two norms may overflow, and so may a mean at the end of the range."""
    largest, smallest = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    norms = np.float32([[largest, smallest], [smallest, largest]] * 20)
    policy = ZScore(2.0, alpha=0.5, warmup_steps=2, record="raw", log=True)
    state, decision = run(policy, series_of(norms))
    assert (state.mean >= smallest).all()
    assert (state.mean <= largest).all()
    assert np.isfinite(state.deviation).all()
    assert not np.isnan(decision.threshold).any()
    state, _ = run(policy, series_of(np.full((40, 1), largest)))
    assert state.mean.tolist() == [largest]
    assert state.deviation.tolist() == [0.0]


# A policy as an object.


@every_policy
def test_a_policy_is_frozen_hashable_comparable_and_copies(policy):
    name = fields(policy)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(policy, name, getattr(policy, name))
    for other in (
        pickle.loads(pickle.dumps(policy)),
        copy.deepcopy(policy),
        type(policy)(**get_arguments(policy)),
    ):
        assert other == policy
        assert hash(other) == hash(policy)
        assert repr(other) == repr(policy)


def test_all_policies_of_the_table_are_different():
    assert len(set(POLICIES.values())) == len(POLICIES)
    assert len(set(map(repr, POLICIES.values()))) == len(POLICIES)


EXTREME = [
    Warmup(Fixed(1.0), steps=3),
    Cap(Warmup(Quantile(history_length=None), steps=0, threshold=2), max_norm=1e-3),
    EmaRatio(warmup_threshold=float("inf")),
    Quantile(np.float32(0.3), history_length=np.int64(7)),
    MeanStd(np.float64(1.5), ddof=np.int32(0), history_length=np.uint8(5)),
    ZScore(np.float32(2), warmup_steps=np.int16(4)),
    EmaRatio(2, warmup_steps=np.int64(3)),
    Warmup(Fixed(np.float64(1)), steps=np.int64(3), threshold=np.float32(1)),
]


@pytest.mark.parametrize("policy", [*POLICIES.values(), *EXTREME], ids=as_code)
def test_the_repr_makes_the_policy_again(policy):
    """The repr holds plain Python numbers, also for NumPy arguments."""
    assert policy_of(repr(policy)) == policy
    assert policy_of(as_code(policy)) == policy
    assert "np." not in repr(policy)
    plain = (float, int, bool, str, type(None))
    for value in get_arguments(policy).values():
        parts = (
            [part for pair in value for part in pair] if type(value) is tuple else []
        )
        for part in parts or [value]:
            assert type(part) in plain or Policy in type(part).__mro__


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("Fixed(2)", "Fixed(max_norm=2.0)"),
        (
            "Quantile()",
            "Quantile(quantile=0.9, history_length=1000, include_current=False)"
            "  # clips about 10 % of steps",
        ),
        (
            "MeanStd()",
            "MeanStd(deviations=2.0, history_length=1000, log=False, ddof=1,"
            " include_current=False)",
        ),
        (
            "ZScore()",
            "ZScore(z=2.5, alpha=0.97, warmup_steps=25, target='reciprocal',"
            " record='winsorized')",
        ),
        (
            "ZScore(log=True)",
            "ZScore(z=2.5, alpha=0.97, warmup_steps=25, target='reciprocal',"
            " record='winsorized', log=True)",
        ),
        (
            "EmaRatio()",
            "EmaRatio(ratio=1.05, beta=0.98, warmup_steps=100, warmup_threshold=1.0)",
        ),
        ("ParamRatio()", "ParamRatio(clipping=0.01, eps=0.001)"),
        (
            "StreamingQuantile(0.975)",
            "StreamingQuantile(quantile=0.975, rate=0.05)"
            "  # clips about 2.5 % of steps",
        ),
        (
            "Warmup(StreamingQuantile(), steps=2)",
            "Warmup(policy=StreamingQuantile(quantile=0.9, rate=0.05), steps=2,"
            " threshold=float('inf'))  # clips about 10 % of steps",
        ),
        ("Drop(Fixed(1))", "Drop(policy=Fixed(max_norm=1.0), action='zero')"),
        ("Cap(Fixed(1), max_norm=2)", "Cap(policy=Fixed(max_norm=1.0), max_norm=2.0)"),
        (
            "Floor(Fixed(1), min_norm=2)",
            "Floor(policy=Fixed(max_norm=1.0), min_norm=2.0)",
        ),
    ],
)
def test_names_and_defaults_are_the_public_ones(code, expected):
    assert repr(policy_of(code)) == expected


@pytest.mark.parametrize(
    ("policy", "rate"),
    [
        (Quantile(0.9), 0.1),
        (Quantile(0.1, include_current=True), 0.9),
        (Quantile(1 / 3), 0.666666666667),
        (StreamingQuantile(1 / 3), 0.666666666667),
        (Warmup(Quantile(0.75), steps=3), 0.25),
        (Drop(Quantile(0.75)), 0.25),
        (Fixed(1.0), None),
        (MeanStd(), None),
        (Cap(Quantile(0.9), max_norm=1.0), None),
        (policy_of("Floor(Quantile(0.9), min_norm=1.0)"), None),
        (policy_of("ParamRatio()"), None),
    ],
    ids=repr,
)
def test_the_expected_clip_rate_is_said_where_it_is_known(policy, rate):
    assert policy.expected_clip_rate == rate


def test_who_needs_the_norms_of_the_parameters():
    needing = {code for code, p in POLICIES.items() if p.needs_param_norms}
    assert needing == {code for code in POLICIES if "ParamRatio" in code}
    assert len(needing) > 1


# A policy uses only the documented names: the sealed namespace has no others.


class Sealed:
    """An array that supports only arithmetic, comparison, slicing and its shape."""

    __array_ufunc__ = None  # NumPy leaves its operators to this class
    __hash__ = None

    def __init__(self, array):
        self._array = array

    @property
    def shape(self):
        return self._array.shape

    def __getitem__(self, key):
        parts = key if isinstance(key, tuple) else (key,)
        assert all(k is None or isinstance(k, slice | int) for k in parts), key
        return Sealed(self._array[key])

    def __bool__(self):
        raise AssertionError("a branch on data")

    def __array__(self, *args, **kwargs):
        raise AssertionError("a namespace was passed by")

    __float__ = __int__ = __index__ = __len__ = __iter__ = __bool__


def sealed_operator(name):
    function = getattr(operator, name)

    def forward(self, other):
        return Sealed(function(self._array, opened(other)))

    def reflected(self, other):
        return Sealed(function(opened(other), self._array))

    return forward, reflected


OPERATORS = "add sub mul truediv floordiv and_ or_ gt ge lt le eq"
for name in OPERATORS.split():
    forward, reflected = sealed_operator(name)
    setattr(Sealed, f"__{name.strip('_')}__", forward)
    setattr(Sealed, f"__r{name.strip('_')}__", reflected)
Sealed.__invert__ = lambda self: Sealed(~self._array)


def opened(value):
    """Return the content of a sealed array, or of a list of sealed arrays."""
    if isinstance(value, list):
        return [opened(one) for one in value]
    return value._array if isinstance(value, Sealed) else value


class SealedNamespace:
    """The documented names and no others, on sealed arrays."""

    def __init__(self):
        self.used = set()
        self.copied = {}

    def __getattr__(self, verb):
        # Optional: the first returns copies on a device, the second has a derivative.
        if verb in ("get_tables", "divide_smoothly"):
            raise AttributeError(verb)
        if verb not in NAMESPACE_NAMES:
            raise AssertionError(f"xp.{verb} is not in NAMESPACE_NAMES")
        self.used.add(verb)
        function = getattr(np, verb)
        if verb in ("float32", "int32"):
            return function

        def call(*args, **kwargs):
            if verb == "asarray" and isinstance(args[0], np.ndarray):
                self.copied[id(args[0])] = args[0]
            named = {name: opened(value) for name, value in kwargs.items()}
            return Sealed(function(*map(opened, args), **named))

        return call


def sealed_run(policy, series, **settings):
    """Do as `run`; return the namespace and the number of copied tables, too."""
    xp = SealedNamespace()
    state = policy.init(series.norms.shape[1], xp)
    decisions, tables = [], []
    for inputs in zip(*series, strict=True):
        norms, observed, param_norms = map(Sealed, inputs)
        given = {"observed": observed, "param_norms": param_norms}
        state, decision = decide(policy, state, norms, **given, **settings, xp=xp)
        decisions.append([opened(field) for field in decision])
        tables.append(len(xp.copied))
    return xp, tables, Decision(*map(np.stack, zip(*decisions, strict=True)))


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "propagate"])
@each(STATIC)
def test_a_policy_uses_the_documented_verbs_and_never_looks(policy, nonfinite):
    """No other name, no branch on data, no method of an array, no write in place."""
    series = cut(parity_series(), 25)
    _, _, decision = sealed_run(policy, series, nonfinite=nonfinite)
    _, expected = run(policy, series, nonfinite=nonfinite)
    assert_same(decision, expected)


def test_every_documented_verb_is_used():
    used = {"asarray"}
    for policy in STATIC.values():
        used |= sealed_run(policy, cut(parity_series(), 3))[0].used
    used |= sealed_run(Fixed(1.0), cut(parity_series(), 3), nonfinite="skip")[0].used
    assert used == set(NAMESPACE_NAMES)


@each(STATIC)
def test_tables_are_the_same_objects_in_every_step(policy):
    """A namespace copies each table to its device once, not once per step."""
    _, tables, _ = sealed_run(policy, cut(parity_series(), 6))
    assert tables == [tables[0]] * 6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda xp, norms: xp.median(norms),
        lambda xp, norms: norms.max(),
        lambda xp, norms: norms if norms > 1 else 1.0,
        lambda xp, norms: float(norms),
        lambda xp, norms: norms[norms > 1],
        lambda xp, norms: np.sqrt(norms),
        lambda xp, norms: operator.setitem(norms, 0, 1.0),
        lambda xp, norms: max(norms, xp.zeros((1,))),
        lambda xp, norms: [norm for norm in norms],
        lambda xp, norms: norms**2,
    ],
)
def test_the_seal_holds(wrong):
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        wrong(SealedNamespace(), Sealed(np.ones(1, np.float32)))
    assert leaves(()) == []


def test_the_trust_ratio_leaves_weights_of_0_alone():
    """`ParamRatio` has a floor for them. A norm that is not finite has no threshold."""
    policy = TrustRatio(0.5)
    norms = np.float32([4.0, 1.005e-30, 1e-30, 0.0, np.nan, np.inf])
    limit = policy.limit(policy.init(6), param_norms=norms)
    expected = [2.0, 0.5025e-30, np.inf, np.inf, np.inf, np.inf]
    np.testing.assert_allclose(limit.threshold, expected, rtol=1e-6)
    assert limit.target is limit.threshold
