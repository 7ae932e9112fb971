"""Every example runs as a user would run it, and clips what it says."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(example, *arguments):
    """What an example prints."""
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
def here(monkeypatch, capsys):
    """What an example prints, run in this process: its framework is imported once."""

    def run_here(example, *arguments):
        monkeypatch.setattr(sys, "argv", [example, *arguments])
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def load(example):
    """An example as a module, for a look at its parts."""
    spec = importlib.util.spec_from_file_location(example, EXAMPLES / f"{example}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def number(pattern, text):
    """The number at `#` of a pattern in which any run of spaces is one."""
    places = pattern.replace(" ", r"\s+").replace("#", r"([\d.e+-]+|nan|inf)")
    return float(re.search(places, text)[1])


def rows(text, columns):
    """The lines that hold `columns` numbers; a percentage is a number."""
    lines = [line.replace("%", "").split() for line in text.splitlines()]
    numbers = [line for line in lines if len(line) == columns]
    return [[float(n) for n in line] for line in numbers if line[0][0].isdigit()]


@pytest.mark.needs("torch")
def test_seq2seq_learns_where_the_decoder_is_clipped(here):
    free = here("seq2seq.py", "--clip", "none", "--steps", "200")
    told = here("seq2seq.py", "--clip", "decoder", "--steps", "200")
    assert number("none: #%", free) < 50
    assert number("decoder: #%", told) > 80
    assert number("decoder clipped #%", told) > 20
    assert "encoder" not in told


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
    assert all(len(found) == 1 for found in scales.values())  # one factor for a part
    assert {part for part, found in scales.items() if max(found) < 1} == set(parts)


@pytest.mark.needs("torch")
def test_seq2seq_has_a_clipper_for_each(here):
    told = here("seq2seq.py", "--clip", "both", "--steps", "60")
    thresholds = [number(f"{n} .* now at #", told) for n in ("encoder", "decoder")]
    assert thresholds[0] != thresholds[1]


@pytest.mark.needs("torch")
def test_the_players_of_a_gan_have_a_history_each():
    told = run("gan.py", "--steps", "300")
    thresholds = []
    for player in ("generator", "discriminator"):
        assert 0 < number(f"{player} clipped #%", told) < 60
        assert number(rf"{player} clipped \S+ of #", told) == 300
        thresholds.append(number(f"{player} .* now at #", told))
    assert thresholds[0] != thresholds[1]


@pytest.mark.needs("torch")
def test_the_norm_of_shards_is_that_of_the_whole():
    told = run("fsdp2.py", "--steps", "40")
    assert number("sharded to gathered #", told) < 1e-5
    assert number("both halves #", told) == 40
    assert number("largest norm #", told) > 3 * number("threshold #", told)
    assert 10 <= number("clipped #%", told) < 80


@pytest.mark.needs("torch", "stacks")
def test_lightning_goes_on_with_the_history():
    half, whole = rows(run("lightning_trainer.py"), 5)
    assert [half[2], whole[2]] == [80, 160]
    assert whole[1] < 1.0
    assert 5 < whole[3] < 40


@pytest.mark.needs("torch", "stacks")
def test_the_trainer_logs_what_was_clipped():
    found = rows(run("hf_trainer.py", "--steps", "60"), 6)
    assert [row[0] for row in found] == [10, 20, 30, 40, 50, 60]
    for _, _, norm, threshold, after, rate in found:
        assert after == pytest.approx(min(norm, threshold), abs=2e-3)
        assert 0 < rate < 90
    assert found[-1][1] < 0.6 * found[0][1]


@pytest.mark.needs("tf")
def test_fit_clips_and_goes_on_from_a_file(here):
    told = here("keras_fit.py", "--epochs", "4")
    assert len(rows(told, 4)) == 4
    assert number("unclipped #", told) > 5
    assert number(": clipped #", told) < 0.5


@pytest.mark.needs("tf")
def test_a_custom_loop_goes_on_from_a_checkpoint(here):
    half, whole = rows(here("keras_custom_loop.py"), 6)
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
def test_a_chain_with_a_clipper_learns(example, here):
    told = here(example, "--steps", "150")
    assert not number("unclipped loss #", told) < 10  # or NaN
    assert number("\nclipped loss #", told) < 0.5
    assert number("clip/steps #", told) == 150
    assert number("clip/norm #", told) > 100 * number("clip/norm_after #", told)
