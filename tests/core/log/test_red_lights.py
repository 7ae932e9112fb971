"""Red lights: none on a healthy run, and each with an action that the policy allows."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import autoclip_core
from autoclip_core import (
    Cap,
    ClipLog,
    Drop,
    EmaRatio,
    Fixed,
    MeanStd,
    ParamRatio,
    Quantile,
    Scheduled,
    StreamingQuantile,
    ZScore,
    decide,
    replay,
)
from autoclip_core.log.advice import advise_on_ratchet
from autoclip_core.log.rate_advice import advise_on_high
from autoclip_core.log.red_lights import choose_steps, diagnose_steps, find_red_lights
from autoclip_core.log.settings import (
    ARGUMENTS,
    find_policy,
    name_argument,
    records_clipped_norms,
    select_settings,
)
from autoclip_core.planning.plot import replay_to_steps

from ...support.log_steps import steps_of

NAN, INF = math.nan, math.inf


def red_lights(log):
    return [s for s in log.summary().advice if s.startswith("Red light")]


def find_lights(steps, settings, is_update):
    return find_red_lights(*diagnose_steps(steps), settings, is_update)


# The policy in use.


@pytest.mark.parametrize(
    ("policy", "name", "argument", "is_clipped"),
    [
        (Quantile(0.9), "Quantile", "`quantile`", False),
        (Cap(StreamingQuantile(0.5), max_norm=9.0), "StreamingQuantile", "`qu", False),
        (MeanStd(2.0), "MeanStd", "`deviations`", False),
        (ZScore(), "ZScore", "`z`", False),
        (ZScore(record="applied"), "ZScore", "`z`", True),
        (EmaRatio(2.0), "EmaRatio", "`ratio`", True),
        (Fixed(1.0), "Fixed", "`max_norm`", False),
        (ParamRatio(0.1), "ParamRatio", "`clipping`", False),
        (Scheduled([(0, 1.0)]), "Scheduled", "the thresholds of the sch", False),
        ("QuantileClip(quantile=0.5, scope='global')", "QuantileClip", "`qua", False),
        ("ZClip(z=2.5, record='applied')", "ZClip", "`z`", True),
        ("TrustClip(ratio=0.02, quantile=0.9)", "TrustClip", "`quantile`", None),
        ("my own rule", "", "the threshold", None),
    ],
    ids=str,
)
def test_the_settings_name_the_policy(policy, name, argument, is_clipped):
    settings = ClipLog(settings={"seed": 3, "policy": policy}).settings
    assert find_policy(settings) == name
    assert name_argument(settings).startswith(argument)
    assert bool(records_clipped_norms(settings)) is bool(is_clipped)


def test_every_policy_has_an_argument_that_raises_its_threshold():
    """A combinator has the argument of the policy inside it."""
    kinds = {
        name: kind.__dataclass_fields__
        for name, kind in vars(autoclip_core).items()
        if hasattr(kind, "limit") and kind is not autoclip_core.Policy
    }
    policies = {name for name, fields in kinds.items() if "policy" not in fields}
    assert "Quantile" in policies
    assert policies - ARGUMENTS.keys() == set()


# Healthy runs.

HEALTHY_POLICIES = [
    *(Quantile(0.9), Quantile(0.5), Quantile(0.5, history_length=100)),
    *(StreamingQuantile(0.9), MeanStd(2.0), MeanStd(2.0, log=True), ZScore(2.5)),
    *(EmaRatio(2.0, warmup_threshold=INF), ZScore(2.5, record="applied")),
]


@pytest.mark.parametrize("policy", HEALTHY_POLICIES, ids=repr)
@pytest.mark.parametrize("is_named", [True, False])
def test_a_run_whose_norms_fall_has_no_red_light(policy, is_named):
    """Norms of an LSTM fall by a factor of 100, so the threshold must fall too."""
    rng = np.random.default_rng(0)
    level = 100 * np.exp(-np.linspace(0, 4.6, 600))
    norms = level * np.exp(rng.normal(0, 0.3, 600))
    settings = {"settings": {"policy": policy}} if is_named else {}
    report = replay(norms, policy)
    log = ClipLog.from_steps(replay_to_steps(report), settings)
    assert red_lights(log) == []


@pytest.mark.needs("torch")
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_a_healthy_recurrent_network_has_no_red_light(scope):
    """Its loss and its norms fall, so its threshold falls; then it clips more."""
    import torch

    from autoclip_torch import QuantileClip

    torch.manual_seed(4)
    lstm, head = torch.nn.LSTM(1, 8, batch_first=True), torch.nn.Linear(8, 1)
    model = torch.nn.ModuleList([lstm, head]).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    clipper = QuantileClip(model, quantile=0.5, scope=scope)
    log, losses, x = ClipLog(clipper.names), [], torch.randn(16, 6, 1).double()
    for _ in range(300):
        loss = ((head(lstm(x)[0][:, -1]) - 3 * x.mean(1)) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        log.record(clipper.step())
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.05 * losses[0]
    first, last = log.thresholds[1:100], log.thresholds[-100:]
    assert np.median(last) < 0.7 * np.median(first)
    assert log.clipped[-100:].mean() > log.clipped[:100].mean() + 0.1
    assert red_lights(log) == []


@pytest.mark.parametrize("policy", [Quantile(0.9), Quantile(0.5), Fixed(2.0)], ids=repr)
def test_another_clip_before_is_a_red_light(policy):
    """Of the norms exp(z), z normal, those above 1 are cut off: half of them."""
    norms = np.exp(np.random.default_rng(0).normal(size=400))
    cut = np.minimum(norms, np.float32(0.99999994))
    (light,) = red_lights(ClipLog.from_steps(replay_to_steps(replay(cut, policy))))
    count = int(np.sum(norms >= 0.999))
    assert f"the norm is 1 in {count} of 400 steps. Remove the other clip" in light
    assert red_lights(ClipLog.from_steps(replay_to_steps(replay(norms, policy)))) == []


LABELLED = Path(__file__).parents[2] / "support" / "labelled_series.npz"


ALL_POLICIES = [
    *(Quantile(0.9), Quantile(0.5), StreamingQuantile(0.9), MeanStd(2.0), ZScore()),
    *(ZScore(record="applied"), EmaRatio(), Fixed(1.0), Fixed(0.01)),
]


def labelled_norms(*labels):
    """Return the norms of the kept runs with one of these labels."""
    with np.load(LABELLED) as file:
        parts = np.split(file["norms"], np.cumsum(file["sizes"])[:-1])
        about = json.loads(str(file["about"]))
    runs = zip(about, parts, strict=True)
    return [n for run, n in runs if run["kept"] and run["label"] in labels]


def lights_of(norms, policy):
    steps = replay_to_steps(replay(norms, policy))
    return red_lights(ClipLog.from_steps(steps, {"settings": {"policy": policy}}))


@pytest.mark.parametrize("policy", ALL_POLICIES, ids=repr)
def test_no_healthy_run_has_a_red_light_under_any_policy(policy):
    """Also if the policy clips each step, or its threshold can only fall."""
    runs = sorted(labelled_norms("healthy", "spikes"), key=len)[::8]
    assert len(runs) >= 10
    assert [lights_of(norms, policy) for norms in runs] == [[]] * len(runs)


def test_most_damaged_runs_have_a_red_light():
    runs = labelled_norms("never healthy", "diverged", "non-finite")[::3]
    policies = itertools.cycle(ALL_POLICIES)
    lights = [lights_of(*pair) for pair in zip(runs, policies, strict=False)]
    assert len(lights) >= 20
    assert sum(map(bool, lights)) > 0.5 * len(lights)


# A threshold that falls although the norms do not.


def ratchet(after, clips, norm=1.0, before=10.0, size=300):
    """A run of three thirds; the last has another threshold, rate and norm."""
    is_last = np.arange(size) >= 2 * size // 3
    place = np.arange(size) - 2 * size // 3
    return steps_of(
        range(size),
        np.where(is_last, after, before),
        is_last & (place < clips),
        np.where(is_last, norm, 1.0),
    )


@pytest.mark.parametrize(
    ("after", "clips", "norm", "count"),
    [
        (7.0, 11, 1.0, 0),
        (6.99, 10, 1.0, 0),
        (6.99, 11, 1.0, 1),
        (6.99, 11, 0.9, 0),
        (6.99, 11, 0.91, 1),
        (6.99, 0, 1.0, 0),
    ],
)
def test_a_threshold_falls_by_a_third_while_a_tenth_more_is_clipped(
    after, clips, norm, count
):
    assert len(advise_on_ratchet(ratchet(after, clips, norm), {}, False)) == count


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("", "Give the policy the norms before clipping"),
        ("EmaRatio(ratio=1.05)", "Raise `ratio`, or take a quantile"),
        ("AdaGC(ratio=1.05)", "AdaGC records norms after clipping"),
        ("ZScore(z=2.0, record='applied')", "Set record='winsorized'"),
        ("ZClip(z=2.0, record='winsorized')", None),
        ("Quantile(quantile=0.5)", None),
        ("QuantileClip(quantile=0.5)", None),
        ("Scheduled(points=((0, 3.0), (9, 1.0)))", None),
    ],
)
@pytest.mark.parametrize("has_several_rows", [False, True])
def test_only_a_policy_that_records_clipped_norms_is_blamed(
    policy, words, has_several_rows
):
    settings = {"policy": policy}
    sentences = advise_on_ratchet(ratchet(3.0, 80), settings, has_several_rows)
    if words is None or (has_several_rows and not policy):
        assert sentences == []
        return
    [sentence] = sentences
    assert words in sentence
    assert "fell from 10 to 3, although the median norm went from 1 to 1" in sentence
    assert "the clip rate rose from 0 % to 80 %" in sentence
    assert "record raw" not in sentence


def test_a_real_ratchet_is_found():
    """AdaGC on heavy tails: gamma falls below most norms, which stay as they are."""
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 1.5, 3000))
    policy = EmaRatio(1.05, beta=0.999, warmup_steps=1, warmup_threshold=INF)
    norms[0] = 20.0
    steps = replay_to_steps(replay(norms, policy))
    log = ClipLog.from_steps(steps, {"settings": {"policy": policy}})
    assert "EmaRatio records norms after clipping" in " ".join(log.summary().advice)
    assert red_lights(log) == []


def test_thirds_are_of_the_run_not_of_the_stored_steps():
    """Steps without a norm or a threshold do not move the first or the last step."""
    steps = ratchet(3.0, 80)
    steps["step"] += 1000
    [light] = advise_on_ratchet(steps, {}, False)
    more = steps_of([0, 1, 5000, 5001], [INF, 9.0, 9.0, INF], norm=[1, NAN, INF, 1])
    both = np.sort(np.concatenate([steps, more]))
    assert advise_on_ratchet(both, {}, False) == [light]
    assert advise_on_ratchet(steps[:-1][steps["step"][:-1] != 1100], {}, False) == []
    assert advise_on_ratchet(steps_of([7] * 300, 1.0), {}, False) == []
    assert advise_on_ratchet(steps[:0], {}, False) == []


# Divergence.


def run_of(norms, threshold=2.0):
    norms = np.asarray(norms, float)
    return steps_of(range(len(norms)), threshold, norms > threshold, norms)


EXPLOSION = np.r_[np.exp(0.3 * np.sin(np.arange(300))), np.geomspace(2, 1e6, 100)]


@pytest.mark.parametrize(
    ("policy", "action"),
    [
        ("Quantile(quantile=0.9)", "with TrustClip (JAX: `trust_clip`), or set `max_"),
        ("NormClip(max_norm=2.0)", "the learning rate, or bound the update with Trust"),
        ("TrustClip(ratio=0.02)", "Lower the learning rate, or `ratio` of TrustClip."),
        ("", "Lower the learning rate, bound the update with TrustClip (JAX: `trust"),
    ],
)
def test_a_divergence_has_an_action_that_the_policy_allows(policy, action):
    [light] = find_lights(run_of(EXPLOSION), {"policy": policy}, False)
    assert light.startswith("Red light: ")
    assert "diverged at step 3" in light
    assert action in light
    has_cap = "set `max_threshold` (JAX: `Cap(policy, max_norm)`)" in light
    assert has_cap == (policy in ("Quantile(quantile=0.9)", ""))
    assert find_lights(run_of(EXPLOSION[:300]), {}, False) == []


@pytest.mark.parametrize(
    ("policy", "action"),
    [
        ("TrustClip(ratio=0.02)", "Lower the learning rate, or `ratio` of TrustClip."),
        ("UpdateClipper(policy=ParamRatio(clipping=0.02))", "rate, or the bound."),
        ("", "Lower the learning rate, or the bound; after a dry run, set dry_run="),
    ],
)
def test_a_divergence_of_the_updates_names_the_bound_in_use(policy, action):
    [light] = find_lights(run_of(EXPLOSION), {"policy": policy}, True)
    assert action in light


# The first steps.


@pytest.mark.parametrize(
    ("first", "is_bounded", "end"),
    [
        (1e4, False, "To clip it, set `warmup_threshold` (JAX: `Warmup("),
        (1e4, True, "the median norm after it is 1."),
        (1.0, False, None),
    ],
)
def test_a_spike_before_the_first_threshold_is_named(first, is_bounded, end):
    log = ClipLog()
    updates = (
        {"clip/update_norm": 1.0, "clip/update_threshold": 2.0} if is_bounded else {}
    )
    for step, norm in enumerate([first, *[1.0] * 149, first, *[1.0] * 50]):
        threshold = 2.0 if step else INF
        log.record({"clip/norm": norm, "clip/threshold": threshold} | updates)
    spikes = [s for s in log.summary().advice if "came before the first" in s]
    assert len(spikes) == (end is not None)
    for sentence in spikes:
        assert sentence.startswith("A spike of 1e+04 came before the first threshold")
        assert end in sentence
        assert ("Warmup" in sentence) != is_bounded


# Dry runs.


@pytest.mark.parametrize(
    ("settings", "is_update"),
    [
        ({"clipper": "NormClip(max_norm=0.001, dry_run=True)"}, False),
        ({"bound": "UpdateClipper(Fixed(max_norm=0.001), dry_run=True)"}, True),
        ({"clipper": "TrustClip(ratio=0.02, dry_run=True)"}, False),
        ({"clipper": "TrustClip(ratio=0.02, dry_run=True)"}, True),
        ({"dry_run": True}, False),
        ({"dry_run": True}, True),
    ],
)
def test_a_dry_run_says_what_would_be_clipped(settings, is_update):
    log = ClipLog(settings=settings)
    log._is_of_updates = is_update
    for norm in EXPLOSION[:300]:
        log.record(norm=norm, threshold=0.001)
    advice = " ".join(log.summary().advice)
    assert "Red light" not in advice
    assert "Nothing was clipped, because of dry_run=True: 100 % would be" in advice
    assert "learning rate" not in advice
    assert "Raise" not in advice


def test_a_divergence_in_a_dry_run_was_not_clipped():
    settings = {"clipper": "NormClip(max_norm=2.0, dry_run=True)"}
    [light] = find_lights(run_of(EXPLOSION), settings, False)
    assert "the clip rate of the last 205 steps would be 48.3 %" in light  # 99


@pytest.mark.parametrize(
    ("clipper", "is_update", "is_switched"),
    [
        ("NormClip(max_norm=2.0, dry_run=True)", False, False),
        ("TrustClip(ratio=0.02, dry_run=True)", False, True),
        ("TrustClip(ratio=0.02, dry_run=True)", True, True),
        ("UpdateClipper(Fixed(max_norm=2.0), dry_run=True)", True, True),
        ("TrustClip(ratio=0.02)", True, False),
    ],
)
def test_a_bound_that_would_help_is_to_be_switched_on(clipper, is_update, is_switched):
    [light] = find_lights(run_of(EXPLOSION), {"clipper": clipper}, is_update)
    assert ("Set dry_run=False" in light) == is_switched
    assert ("`ratio` of TrustClip" in light) == ("ratio=0.02)" in clipper)


def test_the_gradients_of_a_run_with_a_bound_name_the_bound():
    log = ClipLog()
    for norm in EXPLOSION:
        updates = {"clip/update_norm": norm, "clip/update_threshold": 2.0}
        log.record({"clip/norm": norm, "clip/threshold": 2.0} | updates)
    action = "Lower the learning rate, or the bound; after a dry run, set dry_run=False"
    assert [light.partition(action)[1] for light in red_lights(log)] == [action]


# The settings of both halves.

BOTH = {
    "update": "ParamRatio(clipping=0.1)",
    "bound": "UpdateClipper(policy=ParamRatio(clipping=0.1), rows=2)",
    "policy": "EmaRatio(ratio=1.05)",
    "batch": "8",
}


def test_each_half_has_its_own_settings():
    assert list(select_settings(BOTH, is_update=False)) == ["policy", "batch"]
    assert list(select_settings(BOTH, is_update=True)) == ["update", "bound"]
    trust = {"clipper": "TrustClip()"}
    assert select_settings(trust, False) == select_settings(trust, True) == trust


@pytest.mark.parametrize("is_named", [True, False])
def test_a_policy_of_the_gradients_is_not_blamed_for_the_updates(is_named):
    log = ClipLog.from_steps(
        ratchet(3.0, 80), {"settings": BOTH if is_named else {"batch": "8"}}
    )
    log._store.totals.sums["scale"] = 0.1 * 300
    advice = " ".join(log.summary().advice)
    assert ("EmaRatio records norms after clipping" in advice) == is_named
    assert ("or raise `ratio`" in advice) == is_named
    assert "The threshold may follow norms" in advice or is_named
    log._is_of_updates = True
    advice = " ".join(log.summary().advice)
    assert "The bound sets the size of most steps" in advice
    assert "EmaRatio" not in advice
    assert "aise" not in advice


@pytest.mark.parametrize("action", ["skip", "zero"])
@pytest.mark.parametrize(("count", "is_named"), [(120, False), (130, True)])
def test_a_run_that_skips_most_updates_is_named(action, count, is_named):
    policy, log = Drop(Fixed(10.0), action=action), ClipLog()
    state = policy.init(rows=1)
    for step in range(250):
        state, decision = decide(policy, state, [100.0 if step < count else 1.0])
        log.record(decision)
    text = f"{count} of 250 updates (52 %) were skipped: the run hardly trains"
    assert (text in log.summary().advice[-1]) == (is_named and action == "skip")
    log.settings["dry_run"] = "True"
    assert "hardly trains" not in str(log.summary())


def test_another_level_is_named_without_a_red_light():
    log = ClipLog()
    for norm in [*EXPLOSION[:200], *(9 * EXPLOSION[:200])]:
        log.record(norm=norm, threshold=2.0)
    assert red_lights(log) == []
    advice = " ".join(log.summary().advice)
    assert re.search(r"From step (199|200|201) on, the level is (9|8.9)", advice)
    log._is_of_updates = True
    assert "the level" not in " ".join(log.summary().advice)


def test_norms_that_vanish_are_named_without_a_red_light():
    log = ClipLog()
    for norm in [*EXPLOSION[:200], *np.zeros(60)]:
        log.record(norm=norm, threshold=2.0)
    assert red_lights(log) == []
    assert "The norms are 0 from step 200 to the end" in " ".join(log.summary().advice)


def test_a_diverged_run_has_one_red_light():
    log = ClipLog(settings={"policy": Quantile(0.9)})
    policy = Quantile(0.9, history_length=20)
    state = policy.init(rows=1)
    for norm in EXPLOSION:
        state, decision = decide(policy, state, [norm])
        log.record(decision)
    assert len(red_lights(log)) == 1


def test_a_run_that_ends_in_nan_has_a_red_light():
    log = ClipLog()
    for norm in [*EXPLOSION[:300], *[NAN] * 40]:
        log.record(norm=norm, threshold=2.0)
    [light] = red_lights(log)
    assert "step 300" in light
    steps = log._store.steps()
    steps["finite"][300:] = True  # not observed, such as a frozen layer
    assert find_lights(steps, {}, False) == []


def test_a_long_run_is_diagnosed_from_a_sample_and_its_latest_steps():
    steps = run_of(np.ones(100_000))
    chosen = choose_steps(steps)
    assert len(chosen) <= 4096
    assert chosen["step"][[0, -2048, -1]].tolist() == [0, 97_952, 99_999]
    assert choose_steps(steps[:4096]) is not None
    assert len(choose_steps(steps[:4096])) == 4096
    norms = np.exp(0.3 * np.sin(np.arange(100_000)))
    norms[-60:] *= np.geomspace(3, 1e6, 60)
    [light] = find_lights(run_of(norms), {}, False)
    assert "at step 999" in light


# The clip rate and the mean scale.


@pytest.mark.parametrize(
    ("rate", "scale", "signs"),
    [
        (0.5, 0.3, None),
        (NAN, NAN, None),
        (0.501, 0.3, "Clip rate 50.1 % is above 50 %: under SGD"),
        (0.5, 0.2999, "Mean scale 0.2999 is below 0.3: under SGD"),
        (0.9, 0.25, "Clip rate 90 % is above 50 % and mean scale 0.25 is below 0.3: "),
    ],
)
def test_clipping_that_sets_the_size_of_most_steps_is_named(rate, scale, signs):
    settings = {"policy": "Fixed(max_norm=0.1)"}
    sentences = advise_on_high(rate, scale, settings, False)
    if signs is None:
        assert sentences == []
        return
    [sentence] = sentences
    assert sentence.startswith(signs)
    assert "Lower the learning rate instead, or raise `max_norm`." in sentence
