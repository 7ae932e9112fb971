"""`skip_steps(..., loss_policy=)`: decisions on the extra argument `value`.

`tests/core/test_loss.py` tests the rule itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autoclip_core import Drop, Fixed, MeanStd, Quantile, Warmup
from autoclip_jax import check_state, clip_metrics, skip_steps, upgrade_state

from ..support.other_rules import losses_and_norms, olmo_core

NAN, INF = float("nan"), float("inf")
LOSSES = MeanStd(3.0, history_length=8)


@pytest.fixture(autouse=True)
def strict():
    """Make implicit promotion of types and ranks an error."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def make(inner=None, **keywords):
    keywords = {"loss_policy": LOSSES, **keywords}
    return skip_steps(inner or optax.sgd(0.1, momentum=0.9), Quantile(1.0), **keywords)


def test_decisions_are_those_of_olmo_core():
    rule = Warmup(MeanStd(6.0, history_length=128), steps=63)
    tx = skip_steps(optax.sgd(1.0), rule, loss_policy=rule)
    losses, norms = losses_and_norms()

    def step(state, inputs):
        loss, norm = inputs
        updates, state = tx.update(norm[None], state, value=loss)
        return state, updates[0] == 0

    run = jax.jit(lambda state: jax.lax.scan(step, state, (losses, norms)))
    state, skipped = run(tx.init(jnp.zeros(1)))
    by_loss = olmo_core(losses)
    np.testing.assert_array_equal(skipped, by_loss | olmo_core(norms))
    assert clip_metrics(state)["clip/loss_skipped_total"] == by_loss.sum()


SERIES = [-1.0, 0.0, 1.0, 0.5, 9.0, NAN, INF, 0.5]
SKIPPED = [False, False, False, False, True, True, True, False]


def test_a_spike_skips_the_update():
    """Norms are recorded after a spike of the loss, and not after a NaN."""
    tx = make()
    update = jax.jit(tx.update)
    state, params = tx.init(jnp.ones(2)), jnp.ones(2)
    skipped, counts = [], []
    for number, loss in enumerate(SERIES):
        before = state.skip_inner_state
        gradient = jnp.full(2, 1.0 / (number + 1))
        updates, state = update(gradient, state, params, value=jnp.asarray(loss))
        skipped.append(not updates.any())
        same = jax.tree.map(np.array_equal, before, state.skip_inner_state)
        assert all(jax.tree.leaves(same)) == skipped[-1]
        counts.append(int(state.skip_clip.clip_policy.policy_count[0]))
    assert skipped == SKIPPED
    assert counts == [1, 2, 3, 4, 5, 5, 5, 6]
    assert int(state.skip_total) == 3
    check_state(state)
    metrics = clip_metrics(state)
    jax.tree.map(lambda leaf: leaf.delete(), state)  # as a step that donates it
    assert metrics["clip/loss"] == 0.5
    assert metrics["clip/loss_skipped_total"] == metrics["clip/skipped_total"] == 3
    past = np.array([-1.0, 0.0, 1.0, 0.5, 9.0])
    threshold = past.mean() + 3 * past.std(ddof=1)
    np.testing.assert_allclose(metrics["clip/loss_threshold"], threshold, rtol=1e-6)


def test_the_inner_optimizer_receives_the_value_too():
    """`polyak_sgd` needs it, with and without a loss policy, inside a chain."""
    inner = optax.polyak_sgd()
    gradient = jnp.full(2, 3.0)
    expected, _ = inner.update(gradient, inner.init(gradient), gradient, value=2.0)
    for policy in (Fixed(5.0), None):
        tx = optax.chain(make(inner, loss_policy=policy))
        updates, _ = tx.update(gradient, tx.init(gradient), gradient, value=2.0)
        np.testing.assert_array_equal(updates, expected)


def test_a_step_without_its_loss_is_an_error():
    tx = make()
    with pytest.raises(ValueError, match="value must be given to `update`, got None"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="loss must be of shape"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=jnp.ones(2))


def test_a_policy_that_cannot_limit_losses_is_refused():
    for policy in (MeanStd(log=True), Quantile(include_current=True)):
        with pytest.raises(ValueError, match="loss_policy must be a policy that works"):
            make(loss_policy=policy)
    with pytest.raises(ValueError, match="history_length must be a number"):
        make(loss_policy=MeanStd(history_length=None))


def test_a_state_of_another_loss_policy_is_refused():
    gradient = jnp.ones(2)
    states = {
        "none": make(loss_policy=None).init(gradient),
        "shorter": make(loss_policy=MeanStd(history_length=4)).init(gradient),
    }
    for state in states.values():
        with pytest.raises(ValueError, match="must fit its loss_policy"):
            make().update(gradient, state, value=1.0)
    with pytest.raises(ValueError, match="must fit its loss_policy"):
        make(loss_policy=None).update(gradient, make().init(gradient))
    begun = states["none"]._replace(skip_loss=make().init(gradient).skip_loss)
    make().update(gradient, begun, value=1.0)


def test_a_broken_state_of_losses_is_found():
    tx = make(loss_policy=Drop(LOSSES))
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=jnp.float32(-3.0))
    check_state(state)
    losses = state.skip_loss.skip_loss_state
    ring = losses.loss_policy.loss_ring.at[0, 0].set(jnp.nan)
    window = losses.loss_policy._replace(loss_ring=ring)
    losses = losses._replace(loss_policy=window)
    broken = state._replace(skip_loss=state.skip_loss._replace(skip_loss_state=losses))
    with pytest.raises(ValueError, match=r"skip_loss_state\.loss_policy: holds other"):
        check_state((broken,))


def test_a_state_of_nested_dicts_without_losses_is_upgraded():
    state = make(loss_policy=None).init(jnp.ones(2))
    saved = state._asdict() | {"skip_inner_state": {"count": 0}}
    earlier_names = {"skip_inner_state": "inner_state"}
    old = {earlier_names.get(n, n): v for n, v in saved.items() if n != "skip_loss"}
    assert upgrade_state({"link": old}) == {"link": saved}


def test_metrics_of_several_clippers_have_the_loss_of_their_own():
    tx = optax.chain(make(inner=make(inner=optax.sgd(1.0), loss_policy=None)))
    state = tx.init(jnp.ones(2))
    _, state = tx.update(jnp.ones(2), state, value=jnp.float32(0.25))
    metrics = clip_metrics(state)
    assert metrics["clip/0/loss"] == 0.25
    assert "clip/1/loss" not in metrics
    assert metrics["clip/1/norm"] == metrics["clip/0/norm"]
