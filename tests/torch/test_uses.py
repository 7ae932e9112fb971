"""The uses that this library was made for, each as a small training."""

import statistics

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_torch import NormClip, QuantileClip, StandardClip, ValueClip

from ..support.torch_models import backward, batches, small_model
from ..support.torch_reference import arrays


def recurrent(hidden=8, seed=0):
    """Return a network that reads a sequence and answers once."""
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {"rnn": nn.GRU(2, hidden, batch_first=True), "head": nn.Linear(hidden, 1)}
    )


def sums(steps, seed=0):
    """Yield sequences of numbers and marks; the target sums the marked numbers."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.rand(16, 12, generator=generator)
        mark = (torch.rand(16, 12, generator=generator) < 0.3).float()
        yield torch.stack([x, mark], 2), (x * mark).sum(1, keepdim=True)


def total_norm(parameters):
    """Return the norm of all gradients, in plain NumPy."""
    gradients = arrays([parameter.grad for parameter in parameters])
    flat = np.concatenate([gradient.ravel() for gradient in gradients])
    return float(np.float32(np.sqrt(np.sum(np.square(flat, dtype=np.float64)))))


def fit(model, clip, steps=120, seed=0):
    """Train, and call `clip` between backward and update; return the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for x, y in sums(steps, seed):
        optimizer.zero_grad()
        states, _ = model["rnn"](x)
        loss = nn.functional.mse_loss(model["head"](states[:, -1]), y)
        loss.backward()
        clip()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_learned(losses):
    assert statistics.mean(losses[-20:]) < 0.7 * statistics.mean(losses[:20])


def test_a_quantile_of_the_global_norm_is_saved_loaded_and_refused(tmp_path):
    """The README example of `autoclip`, with one history for all parameters."""
    model = recurrent()
    clipper = QuantileClip(
        model.parameters(), quantile=0.9, history_length=1000, global_clipping=True
    )
    norms, clipped = [], 0

    def clip():
        nonlocal clipped
        norm = total_norm(model.parameters())
        decision = clipper.step()
        if norms:
            threshold = np.quantile(norms, 0.9)
            assert decision.threshold.item() == pytest.approx(threshold, rel=1e-5)
            expected = min(norm, threshold)
            clipped += norm > threshold
        else:
            expected = norm
        after = total_norm(model.parameters())
        assert after == pytest.approx(expected, rel=1e-5)
        norms.append(norm)

    check_learned(fit(model, clip))
    assert clipped > 3

    file = tmp_path / "clipper.pt"
    torch.save(clipper.state_dict(), file)
    state = torch.load(file)
    again = QuantileClip(
        recurrent(seed=1).parameters(),
        quantile=0.9,
        history_length=1000,
        global_clipping=True,
    )
    again.load_state_dict(state)
    assert again.threshold().tolist() == clipper.threshold().tolist()

    other = QuantileClip(
        recurrent(hidden=9).parameters(),
        quantile=0.9,
        history_length=1000,
        global_clipping=True,
    )
    with pytest.raises(
        ValueError, match=r"parameters\[0\]\[0\] is 24 in the state and 27 in"
    ):
        other.load_state_dict(state)
    assert other.threshold().item() == float("inf")


def test_a_quantile_of_each_parameter_s_own_norms():
    """Without `global_clipping` there is one history per parameter."""
    model = recurrent()
    clipper = QuantileClip(model.parameters(), quantile=0.9, history_length=1000)
    parameters = list(model.parameters())
    norms, clipped = [], 0

    def clip():
        nonlocal clipped
        now = [total_norm([parameter]) for parameter in parameters]
        decision = clipper.step()
        if norms:
            thresholds = np.quantile(norms, 0.9, axis=0)
            np.testing.assert_allclose(decision.threshold, thresholds, rtol=1e-5)
            after = [total_norm([parameter]) for parameter in parameters]
            np.testing.assert_allclose(after, np.minimum(now, thresholds), rtol=1e-5)
            clipped += int((now > thresholds).sum())
        norms.append(now)

    check_learned(fit(model, clip))
    assert clipped > 10


class Translator(nn.Module):
    """An encoder and a decoder whose gradients differ greatly in size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.GRU(2, 8, batch_first=True)
        self.decoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self.decoder(self.encoder(x)[0][:, -1])


def test_a_clipper_for_each_half_of_a_model():
    """The limit is the mean plus one standard deviation of the last 32 norms.

    Encoder and decoder have one clipper each, as in a text-to-speech system.
    """
    model = Translator()
    halves = [model.encoder, model.decoder]
    clippers = [
        StandardClip(
            half.parameters(), deviations=1, history_length=32, global_clipping=True
        )
        for half in halves
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    histories, clipped, losses = [[], []], [0, 0], []
    for x, y in sums(120):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        for place, (half, clipper, history) in enumerate(
            zip(halves, clippers, histories, strict=True)
        ):
            norm = total_norm(half.parameters())
            decision = clipper.step()
            limit = float("inf")
            if len(history) > 1:
                limit = statistics.mean(history) + statistics.stdev(history)
            assert decision.threshold.item() == pytest.approx(limit, rel=1e-5)
            after = total_norm(half.parameters())
            assert after == pytest.approx(min(norm, limit), rel=1e-5)
            clipped[place] += norm > limit
            history.append(norm)
            del history[:-32]
        optimizer.step()
        losses.append(loss.item())
    check_learned(losses)
    assert min(clipped) > 5
    one, other = (clipper.threshold().item() for clipper in clippers)
    assert one != pytest.approx(other, rel=0.1)


def test_the_deviation_is_that_of_a_sample():
    """Norms 1 to 32, as in that system's test; ddof is 1, the oldest norm leaves."""
    weight = nn.Parameter(torch.zeros(1))
    clipper = StandardClip([weight], deviations=1, history_length=32)
    for norm in [100.0, *range(1, 33)]:
        weight.grad = torch.tensor([float(norm)])
        decision = clipper.step()
        before = weight.grad.item()
        assert before == pytest.approx(min(norm, decision.threshold.item()))
    expected = 16.5 + 9.380831519646859
    assert clipper.threshold().item() == pytest.approx(expected, rel=1e-6)


def test_percentile_90_of_all_history_after_a_hundred_steps_of_warm_up():
    """The threshold is 1.0 during the warm-up."""
    model = small_model()
    clipper = QuantileClip(
        model.parameters(),
        quantile=0.9,
        history_length=None,
        warmup_steps=100,
        warmup_threshold=1.0,
        global_clipping=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    history, clipped = [], [0, 0]
    for step, batch in enumerate(batches(220)):
        backward(model, batch)
        norm = total_norm(model.parameters())
        decision = clipper.step()
        limit = 1.0 if step < 100 else np.percentile(history, 90)
        assert decision.threshold.item() == pytest.approx(limit, rel=1e-6)
        after = total_norm(model.parameters())
        assert after == pytest.approx(min(norm, limit), rel=1e-5)
        clipped[step >= 100] += norm > limit
        history.append(norm)
        optimizer.step()
    assert clipped[0] > 20
    assert 2 < clipped[1] < 40


@pytest.mark.parametrize("max_norm", [0.5, 1e-7])
def test_a_plain_norm_clip_returns_the_norm(max_norm):
    """The norm is that of `clip_grad_norm_`, which adds 1e-6 to its divisor."""
    model, twin = recurrent(), recurrent()
    clipper = NormClip(model.parameters(), max_norm=max_norm)
    clipped = 0

    def clip():
        nonlocal clipped
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = one.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        norm = total_norm(model.parameters())
        decision = clipper.step()
        torch.testing.assert_close(decision.norm, expected.reshape(1))
        assert decision.norm.item() == pytest.approx(norm, rel=1e-6)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=0)
        after = total_norm(model.parameters())
        assert after == pytest.approx(min(norm, max_norm), rel=1e-6)
        clipped += norm > max_norm

    losses = fit(model, clip)
    assert clipped > 20
    if max_norm == 0.5:
        check_learned(losses)
        assert clipped < 120


def test_a_plain_value_clip_returns_the_norm():
    """The norm before clipping, and the gradients of `clip_grad_value_`."""
    model, twin = recurrent(), recurrent()
    clipper = ValueClip(model.parameters(), clip_value=0.05, global_clipping=True)
    clipped = 0

    def clip():
        nonlocal clipped
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = one.grad.clone()
        norm = total_norm(model.parameters())
        decision = clipper.step()
        torch.nn.utils.clip_grad_value_(twin.parameters(), 0.05)
        assert decision.norm.item() == pytest.approx(norm, rel=1e-6)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        after = total_norm(model.parameters())
        assert decision.scale.item() == pytest.approx(after / norm, rel=1e-5)
        clipped += after < norm

    check_learned(fit(model, clip))
    assert 20 < clipped < 120
