"""Every framework refuses a state that no run can produce.

One table lists a policy, a place in its state after eight norms, and invalid values.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest

from autoclip_core import Fixed, decide
from autoclip_core.clipper.metrics import count_step, empty_tally
from autoclip_core.history.validation import find_invalid_mean, find_problems

from ..support.cases import every_policy, policy_of

WINDOW = ["Quantile(0.5, history_length=5)", "MeanStd(2.0, history_length=5)"]
NAN, INF = float("nan"), float("inf")
# Policies, a place in their state, and the invalid values for it.
TABLE = [
    (WINDOW, "ring", [NAN, INF, -5.0, 0.0, 1e9]),
    (WINDOW, "ordered", [NAN, INF, -5.0, 0.0, 1e9]),
    (WINDOW, "count", [-1, 2, 10]),
    (["ZScore(warmup_steps=2)"], "mean", [NAN, INF, -1.0, 0.0]),
    (["ZScore(warmup_steps=2)"], "deviation", [NAN, INF, -1.0]),
    (["ZScore(warmup_steps=2)"], "count", [-1, 0]),
    (["EmaRatio(2.0, warmup_steps=2)"], "mean", [NAN, INF, -1.0, 0.0]),
    (["EmaRatio(2.0, warmup_steps=2)"], "count", [-1, 0]),
    (["StreamingQuantile(0.5)"], "level", [NAN, -INF, -1.0, 0.0]),
    (["ZScore(warmup_steps=2, log=True)"], "mean", [NAN, INF, -1.0, 0.0]),
    (["Scheduled([(0, 2.0), (9, 1.0)])"], "count", [-1]),
    (["Warmup(StreamingQuantile(0.5), steps=3)"], "recorded", [-1]),
    (["Warmup(StreamingQuantile(0.5), steps=3)"], "inner.level", [NAN, -1.0]),
    (["Cap(Floor(ZScore(), min_norm=0.1), max_norm=9.0)"], "mean", [NAN, -1.0]),
    (["Drop(StreamingQuantile(0.9), action='zero')"], "level", [NAN, -1.0]),
]
BROKEN = [
    pytest.param(policy_of(code), path, value, id=f"{code}: {path} {value}")
    for codes, path, values in TABLE
    for code in codes
    for value in values
]
every_broken_state = pytest.mark.parametrize(("policy", "path", "value"), BROKEN)
# The counts of a run of eight steps, which clips at most half of the norms.
TALLIES = [
    ("steps", -1),
    ("observed", -1),
    ("observed", 9),
    ("clipped", -1),
    ("clipped", 9),
    ("nonfinite", -1),
    ("nonfinite", 9),
    ("skipped", -1),
    ("skipped", 9),
    ("skipped_in_a_row", -1),
    ("skipped_in_a_row", 1),
]
every_broken_tally = pytest.mark.parametrize(("name", "value"), TALLIES)

NORMS = np.float32([3, 1, 4, 1.5, 5, 9, 2, 6])


def record_all(policy):
    """Return the state and the tally after all norms."""
    state, tally = policy.init(rows=1), empty_tally(1)
    for norm in NORMS:
        state, decision = decide(policy, state, [norm])
        tally = count_step(tally, decision)
    return state, tally


def spoiled(array, value):
    """Return a copy with another value in the middle."""
    copy = np.array(array)
    copy.reshape(-1)[copy.size // 2] = value
    return copy


def broken(state, path, value):
    """Return the state with another value at a place, also in an inner state."""
    name, _, rest = path.partition(".")
    part = getattr(state, name)
    new = broken(part, rest, value) if rest else spoiled(part, value)
    return state._replace(**{name: new})


@every_policy
def test_what_a_run_leaves_behind_is_sound(policy):
    rng = np.random.default_rng(0)
    state, tally = policy.init(rows=3), empty_tally(3)
    for step in range(60):
        assert list(find_problems(state, "state")) == []
        assert list(find_problems(tally, "tally")) == []
        norms = rng.lognormal(size=3) * 10.0 ** rng.integers(-3, 3)
        norms[step % 3] = [0, np.nan, np.inf, 1e-30, 1e30][step % 5]
        state, decision = decide(
            policy,
            state,
            norms,
            observed=rng.random(3) > 0.2,
            param_norms=np.ones(3),
            nonfinite=["zero", "skip"][step % 2],
        )
        tally = count_step(tally, decision)


@every_broken_state
def test_a_broken_state_has_a_fault(policy, path, value):
    state, _ = record_all(policy)
    assert list(find_problems(state, "state")) == []
    inner = path.rpartition(".")[0]
    [problem] = find_problems(broken(state, path, value), "state")
    assert problem.startswith(f"state.{inner}: " if inner else "state: ")


@every_broken_tally
def test_a_broken_tally_has_a_fault(name, value):
    _, tally = record_all(Fixed(4.5))
    assert list(find_problems(tally, "tally")) == []
    assert list(find_problems(broken(tally, name, value), "tally"))


def test_one_corrupt_row_among_valid_ones_is_reported():
    state = policy_of("StreamingQuantile(0.5)").init(rows=3)
    state.level[:] = [1.0, -2.0, INF]
    assert list(find_problems(state, "s")) == ["s: level must be > 0, got -2.0"]


class Bare(NamedTuple):
    """A state without a rule, which contains a state with a rule."""

    level: Any
    inner: Any


def test_a_state_without_a_rule_is_sound():
    inner, _ = record_all(policy_of("ZScore()"))
    state = Bare(np.float32([NAN]), inner)
    assert list(find_problems(state, "state")) == []
    [problem] = find_problems(broken(state, "inner.mean", NAN), "state")
    assert problem.startswith("state.inner: mean must be finite")


def test_the_rule_for_a_mean_depends_on_what_is_recorded():
    mean, count = np.float32([NAN]), np.int32([1])
    rules = {0.0: "finite, > 0 after at least one norm", -INF: "finite, and 0 before"}
    for lowest, rule in rules.items():
        assert f"must be {rule}" in find_invalid_mean(mean, count, lowest)


@pytest.mark.needs("torch")
@every_broken_state
def test_torch_refuses_a_broken_state(policy, path, value):
    clipper, plain = of_torch(policy)
    whole, part = plain(), plain()
    inside = part["states"][0]
    for name in path.split("."):
        inside = inside[name]
    inside.reshape(-1)[inside.numel() // 2] = value
    check_torch_refuses(clipper, part, whole)


@pytest.mark.needs("torch")
@every_broken_tally
def test_torch_refuses_a_broken_tally(name, value):
    clipper, plain = of_torch(Fixed(4.5))
    whole, part = plain(), plain()
    part["tally"][name].fill_(value)
    check_torch_refuses(clipper, part, whole)


def of_torch(policy):
    """Return a clipper after all norms, and its method `state_dict`."""
    import torch

    from autoclip_torch import Clipper

    clipper = Clipper([torch.nn.Parameter(torch.ones(1))], policy)
    clipper.observe(NORMS)
    return clipper, clipper.state_dict


def check_torch_refuses(clipper, state, whole):
    import torch

    with pytest.raises(ValueError, match=r"state is invalid: (states\[0\]|tally)"):
        clipper.load_state_dict(state, strict=False)
    torch.testing.assert_close(clipper.state_dict()["states"], whole["states"])
    torch.testing.assert_close(clipper.state_dict()["tally"], whole["tally"])
    clipper.load_state_dict(whole)


@pytest.mark.needs("jax")
@every_broken_state
def test_jax_finds_a_broken_state(policy, path, value):
    import optax

    from autoclip_jax import check_state

    state = of_jax(policy)
    check_state((state, optax.EmptyState()))
    part = with_broken(state, "policy", path, value)
    with pytest.raises(ValueError, match=r"opt_state is invalid: \[0\]\.clip_policy"):
        check_state((part, optax.EmptyState()))


@pytest.mark.needs("jax")
@every_broken_tally
def test_jax_finds_a_broken_tally(name, value):
    from autoclip_jax import check_state

    state = of_jax(Fixed(4.5))
    check_state(state)
    part = with_broken(state, "tally", name, value)
    with pytest.raises(ValueError, match=r"opt_state is invalid: \.clip_tally"):
        check_state(part)


@pytest.mark.needs("jax")
def test_jax_looks_into_each_member_of_a_vmap():
    import jax

    from autoclip_jax import check_state

    state = of_jax(policy_of("ZScore()"))
    many = jax.tree.map(
        lambda leaf: np.stack([leaf] * 6).reshape(2, 3, *leaf.shape), state
    )
    check_state(many)
    with pytest.raises(ValueError, match="mean must be finite"):
        check_state(with_broken(many, "policy", "mean", -1))


@pytest.mark.needs("jax")
def test_jax_refuses_a_state_without_a_clipper():
    from autoclip_jax import check_state

    with pytest.raises(ValueError, match="must hold the state of a clipper, got none"):
        check_state({"count": np.zeros(())})


def of_jax(policy):
    """Return the state of a clipper after all norms."""
    from autoclip_jax import ClipState
    from autoclip_jax.state import rename_fields

    state, tally = record_all(policy)
    one, yes = np.ones(1, np.float32), np.ones(1, bool)
    state, tally = rename_fields(state, "policy_"), rename_fields(tally, "tally_")
    return ClipState(state, one, one, one, ~yes, yes, tally)


def with_broken(state, part, path, value):
    """Return a state of JAX, where each name in a part begins with the part's name."""
    names = ".".join(f"{part}_{name}" for name in path.split("."))
    field = f"clip_{part}"
    return state._replace(**{field: broken(getattr(state, field), names, value)})


@pytest.mark.needs("tf")
@every_broken_state
def test_keras_refuses_a_broken_state(policy, path, value):
    check_keras_refuses(policy, f"clip_policy_{path.replace('.', '_')}", value)


@pytest.mark.needs("tf")
@every_broken_tally
def test_keras_refuses_a_broken_tally(name, value):
    check_keras_refuses(Fixed(4.5), f"clip_tally_{name}", value)


def check_keras_refuses(policy, name, value):
    """Loading refuses the file before it writes a variable; so does `check_state`."""
    import keras

    from autoclip_tf import Clipper
    from autoclip_tf.optimizers import SGD

    first, clip = Clipper(Fixed(1.0)), Clipper(policy)
    optimizer = SGD(0.1, gradient_transformers=[first, clip])
    optimizer.build([keras.Variable([0.0])])
    state, tally = record_all(policy)
    state = clip._state.read_numpy()._replace(policy=state, tally=tally)
    clip._state.write(state)
    clip.check_state()
    file = {}
    optimizer.save_own_variables(file)
    file = {key: np.asarray(array) for key, array in file.items()}
    [place] = [
        i for i, v in enumerate(optimizer.variables) if v is variable(clip, name)
    ]
    before = [v.numpy() for v in optimizer.variables]
    part = file | {str(place): spoiled(file[str(place)], value)}
    with pytest.raises(ValueError, match=r"state of a clipper is invalid: state\."):
        optimizer.load_own_variables(part)
    for variable_now, old in zip(optimizer.variables, before, strict=True):
        np.testing.assert_array_equal(variable_now.numpy(), old)
    optimizer.load_own_variables(file)
    variable(clip, name).assign(part[str(place)])
    with pytest.raises(ValueError, match=r"state of a clipper is invalid: state\."):
        clip.check_state()


def variable(clip, name):
    """Return the variable of the second clipper of an optimizer."""
    [named] = [v for v in clip._variables if v.name.removesuffix("_1") == name]
    return named
