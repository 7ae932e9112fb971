"""2N steps equal N steps, a file, a new process and N more steps, in every format.

A run is a policy at a scope: parameters and an optimizer state. All runs are one
pytree, so each format is one file. Each process compiles all runs in one step.
"""

import asyncio
import gc
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from functools import cache, partial
from hashlib import sha256

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import (
    Drop,
    EmaRatio,
    MeanStd,
    Quantile,
    StreamingQuantile,
    Warmup,
    ZScore,
)
from autoclip_jax import (
    check_state,
    clip_by_mean_std,
    clip_by_policy,
    clip_by_quantile,
    clip_metrics,
    skip_steps,
    trust_clip,
    upgrade_state,
)
from autoclip_jax.state import restore_names

from ..conftest import is_installed
from ..support.cases import STATIC, policy_of

N = 10
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "v": jnp.ones(4)}
SCOPES = {
    "parameter": {"scope": "parameter"},
    "global": {"scope": "global"},
    "unit": {"scope": "unit"},
    "group": {"labels": {"w": "matrix", "b": "vector", "v": "vector"}},
}


def one_of_each_structure():
    """Return one policy for each structure of state.

    A file holds arrays. The arguments of a policy change only their values.
    """
    structures = {
        jax.tree.structure(transformation(code, "unit").init(PARAMS)): code
        for code in STATIC
    }
    return list(structures.values())


def transformation(code, scope):
    """Return a clipper before SGD, or SGD with skipped steps."""
    if code == TRUST:
        optimizer = optax.sgd(0.02, momentum=0.9)
        return trust_clip(optimizer, history_length=20, scope=scope)
    policy, how = policy_of(code), SCOPES[scope]
    if "skip" in code:
        policy = policy.policy if isinstance(policy, Drop) else policy.policy.policy
        return skip_steps(optax.sgd(0.02), policy, **how)
    return optax.chain(clip_by_policy(policy, **how), optax.sgd(0.02))


TRUST = "trust_clip"
CODES = one_of_each_structure()
# A scope changes only the length of the arrays, so one policy runs at every scope.
RUNS = [(code, "unit") for code in CODES]
RUNS += [
    ("Drop(StreamingQuantile(0.9), action='skip')", scope)
    for scope in SCOPES
    if scope != "unit"
]
RUNS += [(TRUST, "unit")]


@cache
def initial_runs():
    """Return the parameters and the initial state of each run."""
    return [(PARAMS, transformation(*run).init(PARAMS)) for run in RUNS]


@cache
def stepper():
    """Return one jitted step of all runs."""
    transformations = [transformation(*run) for run in RUNS]

    def step(tx, params, state, noise):
        grads = jax.tree.map(jnp.add, noise, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(
        lambda runs, noise: [
            step(tx, *run, noise) for tx, run in zip(transformations, runs, strict=True)
        ]
    )


def noise(step, params=PARAMS):
    """Return gradients with heavy tails."""
    rng = np.random.default_rng(step)
    size = rng.lognormal()
    leaves, tree = jax.tree.flatten(params)
    values = [jnp.float32(size * rng.normal(size=leaf.shape)) for leaf in leaves]
    return jax.tree.unflatten(tree, values)


def train(runs, steps):
    """Take these steps in all runs."""
    for step in steps:
        runs = stepper()(runs, noise(step))
    return runs


# The formats: how to write a pytree, and how to read it into one of the same structure.


def save_pickle(tree, path):
    path.write_bytes(pickle.dumps(tree))


def load_pickle(path, like):
    return pickle.loads(path.read_bytes())


def save_npz(tree, path):
    with path.open("wb") as file:
        np.savez(file, *jax.tree.leaves(tree))


def load_npz(path, like):
    # If np.load opens the file itself, it leaves it open after an error.
    with path.open("rb") as file, np.load(file) as saved:
        return jax.tree.unflatten(jax.tree.structure(like), saved.values())


def save_flax(tree, path):
    from flax import serialization

    path.write_bytes(serialization.to_bytes(tree))


def load_flax(path, like):
    from flax import serialization

    return serialization.from_bytes(like, path.read_bytes())


def save_equinox(tree, path):
    import equinox

    with path.open("wb") as file:
        equinox.tree_serialise_leaves(file, tree)


def load_equinox(path, like):
    import equinox

    with path.open("rb") as file:
        return equinox.tree_deserialise_leaves(file, like)


def save_orbax(tree, path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as keeper:
        keeper.save(path, tree)


def load_orbax(path, like):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as keeper:
        return keeper.restore(path, like)


FORMATS = {
    name: pair
    for name, (module, *pair) in {
        "pickle": ("pickle", save_pickle, load_pickle),
        "npz": ("numpy", save_npz, load_npz),
        "flax": ("flax", save_flax, load_flax),
        "equinox": ("equinox", save_equinox, load_equinox),
        "orbax": ("orbax.checkpoint", save_orbax, load_orbax),
    }.items()
    if is_installed(module)
}


# The runs in two processes.


def digest():
    """Return a hash of all bits of the parameters and states of a larger run."""
    tx = optax.chain(
        clip_by_quantile(0.75, history_length=8),
        clip_by_quantile(0.75, history_length=8, scope="global"),
        optax.adam(0.1),
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params = {"b": np.ones(300, np.float32), "w": np.ones((300, 200), np.float32)}
    state, bits = tx.init(params), sha256()
    for number in range(10):
        params, state = step(params, state, noise(number, params))
        for leaf in jax.tree.leaves((params, state)):
            bits.update(np.asarray(leaf).tobytes())
    return bits.hexdigest()


def begin(folder):
    """Take N steps, write the files, and take N more steps."""
    half = train(initial_runs(), range(N))
    for name, (save, _) in FORMATS.items():
        save(half, folder / name)
    return train(half, range(N, 2 * N))


def resume(folder):
    """Take N steps from each of the files, and write the digest.

    Orbax commits its arrays to a device, which would cause another compilation. So they
    are copied to the host first.
    """
    like = initial_runs()
    for name, (_, load) in FORMATS.items():
        half = jax.device_get(load(folder / name, like))
        save_npz(train(half, range(N, 2 * N)), folder / f"{name}, resumed")
    (folder / "digest").write_text(digest())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Return the uninterrupted runs, and the folder with those of another process."""
    folder = tmp_path_factory.mktemp("resume")
    whole = begin(folder)
    code = f"""
import pathlib, sys
from {__name__} import resume
resume(pathlib.Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, folder]
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    subprocess.run(command, cwd=root, check=True, env=environment)
    return whole, folder


def assert_same(one, other):
    """Check that all arrays are equal bit for bit; NaN equals NaN."""
    pairs = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, left), right in pairs:
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        where = f"{RUNS[path[0].idx]}{jax.tree_util.keystr(path[1:])}"
        np.testing.assert_array_equal(left, right, where)


@pytest.mark.parametrize("form", FORMATS)
def test_all_runs_resume_in_a_new_process_bit_for_bit(resumed, form):
    whole, folder = resumed
    assert_same(load_npz(folder / f"{form}, resumed", initial_runs()), whole)


def test_the_runs_differ_from_each_other_and_clip(resumed):
    """Otherwise the comparison would prove little."""
    whole, _ = resumed
    weights = {str(params["w"].tolist()) for params, _ in whole}
    assert len(weights) > len(RUNS) / 2
    clipped = [
        state.skip_clip if "skip" in code else state[0]
        for (code, _), (_, state) in zip(RUNS, whole, strict=True)
    ]
    assert sum(c.clip_tally.tally_clipped.any() for c in clipped) > 0.9 * len(RUNS)


def test_the_same_seed_gives_the_same_bits_in_another_process(resumed):
    _, folder = resumed
    assert (folder / "digest").read_text() == digest()


# Files and states that are broken or do not fit.


@cache
def state_after(tx, norms):
    """Return the state of a transformation after these norms."""
    state = tx.init(jnp.zeros(1))
    for norm in norms:
        _, state = tx.update(jnp.full(1, norm, jnp.float32), state)
    return state


QUANTILE = clip_by_quantile(0.75, history_length=8)
NORMS = tuple(step * 7 % 11 + 1 for step in range(1, 13))
BROKEN = {
    "empty": lambda content: b"",
    "the first half": lambda content: content[: len(content) // 2],
    "95 percent": lambda content: content[: int(0.95 * len(content))],
    "another format": lambda content: b"epoch,loss\n1,0.5\n",
}
"""Contents of a broken file, as functions of the correct content."""
REFUSED = (
    *(EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile),
    RuntimeError,  # Equinox
)
"""The errors of the libraries for a broken or another file."""


class FinishingLoop(asyncio.SelectorEventLoop):
    """An event loop that finishes its tasks before it closes."""

    def close(self):
        tasks = () if self.is_closed() else asyncio.all_tasks(self)
        if tasks:
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


@pytest.fixture
def finish_tasks(monkeypatch):
    """Finish the tasks of a refused restore, so that they cannot fail a later test.

    Orbax reads the arrays of a checkpoint in one task each and closes its event loop
    at the first error. TensorStore's threads then report the other arrays to a closed
    loop: "RuntimeError: Event loop is closed", at any later time. Tasks that did not
    start leave coroutines, whose warnings appear in a garbage collection.
    """
    monkeypatch.setattr(asyncio, "new_event_loop", FinishingLoop)
    yield
    gc.collect()


@pytest.mark.usefixtures("finish_tasks")
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("form", FORMATS)
def test_a_broken_file_is_refused(form, broken, tmp_path):
    (save, load), state = FORMATS[form], state_after(QUANTILE, NORMS)
    path = tmp_path / "state"
    save(state, path)
    for file in filter(pathlib.Path.is_file, [path, *path.rglob("*")]):
        file.write_bytes(BROKEN[broken](file.read_bytes()))
    with pytest.raises(REFUSED):
        load(path, state)


OTHERS = {
    "another history": clip_by_quantile(0.75, history_length=9),
    "another policy": clip_by_policy(ZScore(2.5, warmup_steps=5)),
}


@pytest.mark.usefixtures("finish_tasks")
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_state_of_another_clipper_is_refused(form, other, tmp_path):
    """The library refuses to read it, or `update` raises when it is traced."""
    (save, load), state = FORMATS[form], state_after(QUANTILE, NORMS)
    save(state_after(OTHERS[other], NORMS), tmp_path / "state")
    with pytest.raises(REFUSED):
        jax.jit(QUANTILE.update)(jnp.ones(1), load(tmp_path / "state", state))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_a_state_of_another_type_is_refused(dtype):
    """A cast of the whole optimizer state would round every recorded norm."""
    state = state_after(QUANTILE, NORMS)
    cast = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, state
    )
    words = rf"must fit its policy.*ring.*\(1, 8\) {jnp.dtype(dtype)}.*float32"
    with pytest.raises(ValueError, match=words):
        jax.jit(QUANTILE.update)(jnp.ones(1), cast)


def test_a_state_without_a_field_is_refused():
    """Another version may have other fields."""
    state = state_after(QUANTILE, NORMS)
    window = state.clip_policy._replace(policy_count=None)
    incomplete = state._replace(clip_policy=window)
    with pytest.raises(ValueError, match=r"must fit its policy.*count"):
        QUANTILE.update(jnp.ones(1), incomplete)


STATE = pathlib.Path(__file__).parents[1] / "support" / "states" / "jax-1.npz"


def names_of(state):
    """Return the arrays by path, because some formats store names."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


POLICIES = [
    MeanStd(2.0, history_length=8),
    ZScore(2.5, warmup_steps=5),
    EmaRatio(2.0, warmup_steps=5),
    StreamingQuantile(0.75),
    Warmup(Quantile(0.75, history_length=8), steps=5),
]
SAVED = {"": QUANTILE} | {
    type(policy).__name__: clip_by_policy(policy) for policy in POLICIES
}
"""The transformations by the prefix of their names in the file."""


def write_saved_state():
    """Write the file, as it was done when this structure of the state was new."""
    states = {name: names_of(state_after(tx, NORMS)) for name, tx in SAVED.items()}
    leaves = {
        name + path: leaf for name in SAVED for path, leaf in states[name].items()
    }
    np.savez(STATE, **leaves)


def as_earlier(state):
    """The structure of a state as versions had it that counted no dropped steps."""
    state = restore_names(state)
    return state._replace(clip_tally=state.clip_tally._replace(dropped=None))


def load_saved_state(name):
    """Return a state in the file, and check that all names of arrays are unchanged.

    It has no count of dropped steps, which came later.
    """
    initial = as_earlier(SAVED[name].init(jnp.zeros(1)))
    with np.load(STATE) as file:
        saved = {key: file[key] for key in file.files if key.startswith(f"{name}.")}
    assert list(saved) == [name + path for path in names_of(initial)]
    return jax.tree.unflatten(jax.tree.structure(initial), saved.values())


@pytest.mark.parametrize("name", SAVED)
def test_a_state_of_an_earlier_version_holds_the_same_numbers(name):
    state = upgrade_state(load_saved_state(name))
    expected = state_after(SAVED[name], NORMS)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state, expected)
    SAVED[name].update(jnp.full(1, 99.0), state)


def test_a_state_of_an_earlier_version_can_be_loaded():
    """No name or type in the state may change, because old files would not fit."""
    state = upgrade_state(load_saved_state(""))
    check_state(state)
    updates, state = jax.jit(QUANTILE.update)(jnp.full(1, 99.0), state)
    expected = np.quantile(NORMS[-8:], 0.75)
    np.testing.assert_allclose(updates, [expected], rtol=1e-6)
    assert int(clip_metrics(state)["clip/steps"]) == len(NORMS) + 1


def test_an_earlier_state_is_refused_with_the_way_out():
    """By `update`, which is traced, by `check_state` and by `clip_metrics`."""
    earlier = load_saved_state("")
    for call in (partial(QUANTILE.update, jnp.ones(1)), check_state, clip_metrics):
        with pytest.raises(ValueError, match=r"upgrade_state\(opt_state\)"):
            call(earlier)


def test_states_within_others_are_upgraded():
    """In a chain, in `skip_steps`, under `vmap`, pickled, and as nested dicts."""
    skipping = skip_steps(optax.sgd(1.0), Quantile(0.5, history_length=4))
    tx = optax.chain(clip_by_quantile(0.9), skipping)
    present = jax.vmap(tx.init)(jnp.ones((3, 2)))
    clip, skip = present
    earlier = as_earlier(clip), skip._replace(skip_clip=as_earlier(skip.skip_clip))
    assert len(jax.tree.leaves(earlier)) == len(jax.tree.leaves(present)) - 2
    for old in (earlier, pickle.loads(pickle.dumps(earlier))):
        upgraded = upgrade_state(old)
        assert jax.tree.structure(upgraded) == jax.tree.structure(present)
        jax.tree.map(np.testing.assert_array_equal, upgraded, present)
    unchanged = upgrade_state(present)
    jax.tree.map(np.testing.assert_array_equal, unchanged, present)
    tally = restore_names(clip.clip_tally)._asdict()
    nested = {"0": {"clip_tally": {k: v for k, v in tally.items() if k != "dropped"}}}
    dropped = upgrade_state(nested)["0"]["clip_tally"]["tally_dropped"]
    np.testing.assert_array_equal(dropped, np.zeros(3, np.int32))
    fields = {k: v for k, v in clip._asdict().items() if k != "clip_totals"}
    [upgraded] = upgrade_state([fields | nested["0"]])
    assert set(upgraded) == set(clip._fields)
    assert upgraded["clip_totals"] is None
    assert set(upgraded["clip_tally"]) == set(clip.clip_tally._fields)


EARLIER_FILE = STATE.with_name("jax-3.pickle")
"""The state below, saved when its fields had the names of the core: the objects, and
the nested dicts of `flax.serialization.to_state_dict`."""


def wrapped_clippers():
    """Return each kind of state, one inside another."""
    inner = trust_clip(optax.adam(1e-2), ratio=0.02, history_length=4)
    policy, losses = Quantile(0.5, history_length=4), ZScore(3.0)
    skip = skip_steps(inner, policy, loss_policy=losses)
    last = clip_by_mean_std(history_length=4, norm="rms")
    return optax.chain(skip, optax.masked(last, {"w": True, "b": False}))


def test_objects_and_dicts_with_earlier_names_are_upgraded():
    serialization = pytest.importorskip("flax.serialization")
    saved = pickle.loads(EARLIER_FILE.read_bytes())
    tx, params = wrapped_clippers(), {"w": jnp.ones(3), "b": jnp.ones(2)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"upgrade_state\(opt_state\)"):
        tx.update(params, saved["objects"], params, value=1.0)
    dicts = upgrade_state(saved["dicts"])
    restored = serialization.from_state_dict(state, dicts)
    for norm in (1.0, 2.0, 3.0):
        grads = jax.tree.map(lambda leaf, size=norm: size * leaf, params)
        _, state = tx.update(grads, state, params, value=norm)
    for old in (upgrade_state(saved["objects"]), restored):
        assert jax.tree.structure(old) == jax.tree.structure(state)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), old, state)
    jax.tree.map(np.testing.assert_array_equal, upgrade_state(dicts), dicts)


DROPS = clip_by_policy(
    Drop(MeanStd(1.0, history_length=8), clip=Quantile(0.5, history_length=4))
)
DROPS_FILE = STATE.with_name("jax-2.npz")


def write_saved_drops():
    """Write the second file, as it was done when dropped steps were first counted."""
    np.savez(DROPS_FILE, **names_of(state_after(DROPS, NORMS)))


def test_a_state_that_counts_dropped_steps_can_be_loaded():
    """The names in the file are the core's: they got a prefix later."""
    initial, expected = DROPS.init(jnp.zeros(1)), state_after(DROPS, NORMS)
    fresh = restore_names(initial)
    with np.load(DROPS_FILE) as file:
        saved = dict(file)
    assert list(saved) == list(names_of(fresh))
    old = jax.tree.unflatten(jax.tree.structure(fresh), saved.values())
    state = upgrade_state(old)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), state, expected)
    check_state(state)
    dropped = int(clip_metrics(state)["clip/dropped_total"])
    assert dropped > 0
    _, state = DROPS.update(jnp.full(1, 999.0), state)
    assert int(clip_metrics(state)["clip/dropped_total"]) == dropped + 1
