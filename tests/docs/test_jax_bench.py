"""The JAX benchmark runs, and the docs have marks for two of its tables."""

from ..support.trials import marks, numbers, trial


def test_a_trial_measures_training_steps(scripts, tmp_path, monkeypatch):
    saved = trial("jax_steps", tmp_path, monkeypatch)
    import tables

    made = tables.make_tables(saved)
    assert set(made) & set(marks()) == {"share", "fixed cost"}
    [head, [model, step, fixed, _, quantile, *_]] = made["share"]
    assert (head[2], model, step[-2:]) == ("fixed clip", "JAX, tiny", "µs")
    assert max(float(fixed), float(quantile)) < 100  # percent of the step
    lines = {line["contender"]: line for line in saved["results"]}
    clips = ["optax.clip_by_global_norm", "quantile, global, clips"]
    agc = ["optax.adaptive_grad_clip", "AGC"]
    assert [row[0] for row in made[f"JAX, {clips[0]}"][1:]] == clips
    assert [row[0] for row in made[f"JAX, {agc[0]}"][1:]] == agc
    for reference in (clips[0], agc[0]):
        assert numbers(lines[reference]["ratio"]) == [1.0, 1.0, 1.0]
    assert all(number > 0 for number in numbers(saved["seconds_to_compile"]))


def test_the_window_is_filled_with_norms_around_a_value(scripts):
    import jax
    import numpy as np
    import optax

    import jax_steps
    from autoclip_jax.state import restore_names

    tx = optax.chain(jax_steps.clip_by_quantile(), optax.sgd(1.0))
    clip, _ = jax_steps.with_full_window(tx.init([np.zeros(2), np.zeros(3)]), 10.0)
    window = restore_names(jax.tree.map(np.asarray, clip.clip_policy))
    assert window.find_problem() == ""
    assert window.ring.shape == (2, 1000)
    assert 5 <= window.ring.min() < 6
    assert 14 < window.ring.max() <= 15
