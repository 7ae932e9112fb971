"""Every example runs as a user runs it, and clips what it says."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(example, *arguments):
    """Run an example in a new process and return what it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning:" not in done.stderr
    return done.stdout


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Return a function that runs an example in this process, to save the imports."""

    def run_in_process(example, *arguments):
        monkeypatch.setattr(sys, "argv", [example, *arguments])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    return run_in_process


def load(example):
    """Return an example as a module, to test its functions."""
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def number(pattern, text):
    """Return the number at `#` of a pattern. A space stands for any whitespace."""
    places = pattern.replace(" ", r"\s+").replace("#", r"([\d.e+-]+|nan|inf)")
    return float(re.search(places, text)[1])


def rows(text, columns):
    """Return the lines that hold `columns` numbers; a percentage is a number."""
    lines = [line.replace("%", "").split() for line in text.splitlines()]
    numbers = [line for line in lines if len(line) == columns]
    return [[float(n) for n in line] for line in numbers if line[0][0].isdigit()]


@pytest.mark.needs("torch")
def test_seq2seq_trains_with_a_clipped_decoder(run_script):
    free = run_script("seq2seq.py", "--clip", "none", "--steps", "200")
    output = run_script("seq2seq.py", "--clip", "decoder", "--steps", "200")
    assert number("none: #%", free) < 50
    assert number("decoder: #%", output) > 80
    assert number("decoder clipped #%", output) > 20
    assert "encoder" not in output


@pytest.mark.needs("torch")
@pytest.mark.parametrize("parts", [["decoder"], ["encoder", "decoder"]])
def test_seq2seq_scales_the_parts_it_names_and_no_other(parts):
    example = load("seq2seq")
    clip = "both" if len(parts) == 2 else parts[0]
    model, clippers = example.train(clip, steps=10)
    model.zero_grad()
    model(*example.batch(length=40)).square().sum().backward()
    before = [(name, p.grad.clone()) for name, p in model.named_parameters()]
    for clipper in clippers.values():
        clipper.step()
    scales = {"encoder": set(), "decoder": set()}
    for (name, old), parameter in zip(before, model.parameters(), strict=True):
        scale = float(parameter.grad.norm() / old.norm())
        scales[name.split(".")[0]].add(round(scale, 6))
    # One factor for each part.
    assert all(len(factors) == 1 for factors in scales.values())
    assert {part for part, factors in scales.items() if max(factors) < 1} == set(parts)


@pytest.mark.needs("torch")
def test_seq2seq_has_a_clipper_for_each(run_script):
    output = run_script("seq2seq.py", "--clip", "both", "--steps", "60")
    thresholds = [number(f"{n} .* now at #", output) for n in ("encoder", "decoder")]
    assert thresholds[0] != thresholds[1]


@pytest.fixture
def adam():
    """Return for each Adam and step the norms of the gradient and of the added mean."""
    from torch import cat
    from torch.optim import optimizer as hooked

    pairs_of, means = {}, {}

    def parameters(optimizer):
        groups = optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.grad is not None]

    def flat(tensors):
        return cat([tensor.detach().flatten() for tensor in tensors])

    def before(optimizer, *_):
        given = flat(p.grad for p in parameters(optimizer))
        pairs_of.setdefault(optimizer, []).append([given.norm().item()])

    def after(optimizer, *_):
        mean = flat(optimizer.state[p]["exp_avg"] for p in parameters(optimizer))
        beta = optimizer.param_groups[0]["betas"][0]
        taken = (mean - beta * means.get(optimizer, 0)) / (1 - beta)
        means[optimizer] = mean.clone()
        pairs_of[optimizer][-1].append(taken.norm().item())

    # Hooks for all optimizers run before those of one, and so before the clipper's.
    hooks = [
        hooked.register_optimizer_step_pre_hook(before),
        hooked.register_optimizer_step_post_hook(after),
    ]
    yield pairs_of
    for hook in hooks:
        hook.remove()


def assert_at_most_the_quantile(pairs, quantile, length):
    """Adam received each gradient, clipped to the quantile of the earlier norms."""
    norms, taken = np.transpose(pairs)
    clipped = 0
    for step in range(1, len(norms)):
        limit = np.quantile(norms[max(0, step - length) : step], quantile)
        assert taken[step] == pytest.approx(min(norms[step], limit), rel=1e-3)
        clipped += norms[step] > limit
    assert 0.05 < clipped / len(norms) < 0.6


@pytest.mark.needs("torch")
def test_the_players_of_a_gan_are_clipped_by_their_own_history(adam):
    example = load("gan")
    players = example.train(steps=60)
    for player in players:
        pairs = adam[player.optimizer]
        assert len(pairs) == 60
        assert_at_most_the_quantile(pairs, quantile=0.9, length=200)


@pytest.mark.needs("torch")
def test_a_gan_tells_of_its_players(run_script):
    output = run_script("gan.py", "--steps", "40")
    assert number(r"generator clipped \S+ of #", output) == 40
    assert number(r"discriminator clipped \S+ of #", output) == 40


def clipped_by_hand(model, batches, lr, quantile):
    """Train with plain SGD, torch's clipping and NumPy's quantile."""
    import torch

    norms, weights = [], list(model.parameters())
    for pairs in batches:
        losses = [torch.nn.functional.mse_loss(model(x), y) for x, y in pairs]
        model.zero_grad()
        (sum(losses) / len(losses)).backward()
        limit = np.quantile(norms, quantile) if norms and quantile else np.inf
        norm = torch.nn.utils.clip_grad_norm_(weights, float(limit))
        norms.append(norm.item())
        with torch.no_grad():
            for weight in weights:
                weight -= lr * weight.grad
    return {name: weight.detach() for name, weight in model.named_parameters()}


def assert_clipped(actual, expected, free):
    """The weights equal those clipped by hand, and differ from the unclipped ones."""
    for name, weight in expected.items():
        np.testing.assert_allclose(actual[name], weight, rtol=1e-3, atol=1e-4)
    assert not all(np.allclose(free[n], w, atol=0.05) for n, w in expected.items())


@pytest.mark.needs("torch")
def test_sharded_weights_become_those_of_one_process(tmp_path):
    import torch

    path, steps = tmp_path / "weights.pt", 40
    output = run("fsdp2.py", "--steps", str(steps), "--save", str(path))
    assert number("sharded to gathered #", output) < 1e-5
    assert number("both halves #", output) == steps
    example = load("fsdp2")
    batches = [[example.batch(step, rank) for rank in (0, 1)] for step in range(steps)]
    expected, free = (
        clipped_by_hand(example.network(seed=0), batches, lr=0.05, quantile=quantile)
        for quantile in (0.5, None)
    )
    assert_clipped(torch.load(path), expected, free)


@pytest.mark.needs("torch", "stacks")
def test_lightning_trains_as_a_loop_that_is_clipped_by_hand(tmp_path):
    import torch

    example, path = load("lightning_trainer"), tmp_path / "half.ckpt"
    example.train(1, save=path)
    model, clip = example.train(2, resume=path)
    batches, plain = [[pair] for pair in model.train_dataloader()], {}
    for quantile in (0.8, None):
        torch.manual_seed(0)
        net = example.Regression().net
        plain[quantile] = clipped_by_hand(net, 2 * batches, lr=0.1, quantile=quantile)
    assert_clipped(model.net.state_dict(), plain[0.8], plain[None])
    assert 0.05 < clip.clippers[0].metrics()["clip/clip_rate"] < 0.5


@pytest.mark.needs("torch", "stacks")
def test_lightning_tells_how_it_went_on(run_script):
    half, whole = rows(run_script("lightning_trainer.py", "--epochs", "2"), 5)
    assert [half[2], whole[2]] == [40, 80]
    assert whole[1] < half[1]


@pytest.mark.needs("torch", "stacks")
def test_the_trainer_gives_adam_what_it_logs(adam, run_script):
    logged = rows(run_script("hf_trainer.py", "--steps", "40"), 6)
    (pairs,) = adam.values()
    assert_at_most_the_quantile(pairs, quantile=0.5, length=1000)
    for step, _, norm, _, after, _ in logged:
        given, taken = pairs[int(step) - 1]
        assert norm == pytest.approx(given, abs=2e-3)
        assert after == pytest.approx(taken, abs=2e-3)


@pytest.mark.needs("tf")
def test_fit_clips_and_goes_on_from_a_file(run_script):
    output = run_script("keras_fit.py", "--epochs", "4")
    assert len(rows(output, 4)) == 4
    assert number("unclipped #", output) > 5
    assert number(": clipped #", output) < 0.5


@pytest.mark.needs("tf")
def test_a_custom_loop_goes_on_from_a_checkpoint(run_script):
    half, whole = rows(run_script("keras_custom_loop.py"), 6)
    assert [half[0], whole[0]] == [100, 200]
    assert whole[1] < half[1] < 0.5


@pytest.mark.needs("tf")
def test_a_custom_loop_moves_the_weights_by_the_clipped_gradient():
    import tensorflow as tf

    example = load("keras_custom_loop")
    training, norms = example.Training(), []
    weights = training.model.trainable_variables
    for step in range(12):
        x, y = example.batch(step)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(training.model(x) - y))
        norm = float(tf.linalg.global_norm(tape.gradient(loss, weights)))
        old = [weight.numpy() for weight in weights]
        training.step(x, y)
        moved = [(w.numpy() - o) / 0.05 for w, o in zip(weights, old, strict=True)]
        limit = np.median(norms) if norms else np.inf
        length = np.sqrt(sum(np.sum(np.square(m)) for m in moved))
        assert length == pytest.approx(min(norm, limit), rel=1e-3)
        norms.append(norm)
    assert norms[9] > 20 * np.median(norms)  # the batch whose targets are too large


@pytest.mark.needs("jax", "stacks")
@pytest.mark.parametrize("example", ["flax_training.py", "equinox_training.py"])
def test_a_chain_with_a_clipper_trains(example, run_script):
    output = run_script(example, "--steps", "150")
    assert not number("unclipped loss #", output) < 10  # or NaN
    assert number("\nclipped loss #", output) < 0.5
    assert number("clip/steps #", output) == 150
    assert number("clip/norm #", output) > 100 * number("clip/norm_after #", output)
