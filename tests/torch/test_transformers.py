"""`ClipCallback` in a real Hugging Face Trainer, on a tiny model made from a config."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from autoclip_core import Cap, Fixed, Quantile, read_norms  # noqa: E402
from autoclip_torch import (  # noqa: E402
    AGC,
    Clipper,
    NormClip,
    QuantileClip,
    TrustClip,
    UpdateClipper,
)
from autoclip_torch.transformers import ClipCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")

QUANTILE = {"quantile": 0.5, "history_length": 8, "scope": "global"}


def tiny_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def rows(count=24):
    torch.manual_seed(1)
    ids = torch.randint(0, 17, (count, 8))
    return [{"input_ids": row, "labels": row} for row in ids]


SETTINGS = {
    "max_grad_norm": 0.0,
    "learning_rate": 0.01,
    "save_strategy": "no",
    "max_steps": 6,
}


def trainer(folder, *callbacks, evaluated=None, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        logging_steps=1,
        seed=0,
        **{**SETTINGS, **settings},
    )
    return transformers.Trainer(
        tiny_model(),
        arguments,
        train_dataset=rows(),
        eval_dataset=evaluated,
        callbacks=list(callbacks),
    )


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def logged(run):
    return [entry for entry in run.state.log_history if "grad_norm" in entry]


class OnClip(transformers.TrainerCallback):
    """Listed after a `ClipCallback`, it gives its clipper a function."""

    def __init__(self, callback):
        self.callback, self.steps = callback, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.callback.clipper.on_clip = lambda d, names, step: self.steps.append(step)


def test_it_clips_every_step_and_logs_with_grad_norm(tmp_path, capsys):
    callback = ClipCallback(QuantileClip, **QUANTILE)
    on_clip = OnClip(callback)
    run = trainer(tmp_path, callback, on_clip)
    run.train()
    entries, history = logged(run), []
    clipped = [e["clip/norm"] > e["clip/norm_after"] for e in entries]
    assert on_clip.steps == [step for step, flag in enumerate(clipped) if flag]
    assert len(entries) == 6
    for entry in entries:
        assert entry["clip/norm"] == pytest.approx(entry["grad_norm"], rel=1e-4)
        if history:
            limit = torch.tensor(history).quantile(0.5).item()
            assert entry["clip/threshold"] == pytest.approx(limit, rel=1e-5)
            after = min(entry["clip/norm"], limit)
            assert entry["clip/norm_after"] == pytest.approx(after, rel=1e-5)
        history.append(entry["clip/norm"])
    assert callback.clipper.metrics()["clip/clip_rate"] > 0
    (tmp_path / "run.log").write_text(capsys.readouterr().out)
    read = read_norms(tmp_path / "run.log")
    assert (read.kind, read.column) == ("text log", "grad_norm")
    assert read.norms.tolist() == pytest.approx(history, rel=1e-3)


def test_a_constant_limit_is_that_of_max_grad_norm(tmp_path):
    clipped = trainer(tmp_path, ClipCallback(NormClip, max_norm=0.5))
    builtin = trainer(tmp_path, max_grad_norm=0.5)
    clipped.train()
    builtin.train()
    torch.testing.assert_close(weights(clipped), weights(builtin), rtol=1e-4, atol=1e-5)
    free = trainer(tmp_path)
    free.train()
    assert not torch.allclose(weights(clipped), weights(free), atol=1e-3)


def test_gradient_accumulation_is_one_step(tmp_path):
    callback = ClipCallback(QuantileClip, **QUANTILE)
    trainer(tmp_path, callback, gradient_accumulation_steps=4, max_steps=3).train()
    assert callback.clipper.metrics()["clip/steps"] == 3


@pytest.mark.parametrize(
    "kind", ["quantile", "capped", "agc", "numpy", "trust", "update"]
)
def test_a_resumed_run_has_the_history(tmp_path, kind):
    def make():
        if kind == "quantile":
            return ClipCallback(QuantileClip, **QUANTILE)
        if kind == "numpy":
            return ClipCallback(NormClip, max_norm=np.float32(0.3))
        if kind == "agc":
            return ClipCallback(
                "AGC", clipping=0.02, exclude=["transformer.wte.weight"]
            )
        if kind == "trust":
            settings = {"history_length": 8, "exclude": ["transformer.wpe"]}
            return ClipCallback(TrustClip, quantile=0.5, **settings)
        policy = Cap(Quantile(0.5, history_length=8), max_norm=2.0)
        if kind == "update":
            return ClipCallback(UpdateClipper, policy=policy)
        return ClipCallback(Clipper, policy=policy, scope="group")

    whole = trainer(tmp_path, make(), save_strategy="steps", save_steps=3)
    whole.train()
    saved = tmp_path / "checkpoint-3"
    state = json.loads((saved / "trainer_state.json").read_text())
    assert "ClipCallback" in state["stateful_callbacks"]
    norms = [entry["grad_norm"] for entry in logged(whole)]
    for path in (tmp_path, saved, saved / "trainer_state.json"):
        read = read_norms(path)  # of a run it is the newest checkpoint, the sixth step
        assert (read.kind, read.column) == ("Hugging Face trainer state", "grad_norm")
        assert read.norms.tolist() == norms[: len(read.norms)]
        assert read.steps.tolist() == list(range(1, 7 if path == tmp_path else 4))
    again = trainer(tmp_path, make(), restore_callback_states_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(saved))
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
    (callback,) = [
        c for c in again.callback_handler.callbacks if isinstance(c, ClipCallback)
    ]
    prefix = "clip/update_" if kind == "update" else "clip/"
    assert callback.clipper.metrics()[f"{prefix}steps"] == 6
    resumed_log, whole_log = logged(again)[3:], logged(whole)[3:]
    names = [prefix + name for name in ("norm", "threshold", "scale", "clip_rate")]
    if kind == "trust":
        names += [name.replace("clip/", "clip/update_") for name in names]
        assert 0 < callback.clipper.metrics()["clip/update_clip_rate"] < 1
    for name in names:
        assert [entry[name] for entry in resumed_log] == [
            entry[name] for entry in whole_log
        ]


def test_a_run_with_many_features_resumes_with_the_same_bits(tmp_path):
    """bf16, accumulation, evaluation and early stopping: equal bits after a resume."""

    def make(**more):
        return trainer(
            tmp_path,
            ClipCallback(QuantileClip, **QUANTILE),
            transformers.EarlyStoppingCallback(2),
            evaluated=rows(4),
            bf16=True,
            gradient_accumulation_steps=2,
            learning_rate=0.5,
            max_steps=20,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=False,
            metric_for_best_model="loss",
            **more,
        )

    whole = make()
    whole.train()
    stopped = whole.state.global_step
    assert 4 < stopped < 20
    again = make(restore_callback_states_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == stopped
    assert torch.equal(weights(again), weights(whole))
    assert [e["clip/steps"] for e in logged(again)] == list(range(1, stopped + 1))
    evaluations = [e for e in again.state.log_history if "eval_loss" in e]
    assert not any("clip/norm" in entry for entry in evaluations)


def test_an_infinite_gradient_leaves_the_weights_finite(tmp_path):
    """The trainer's own measurement with `max_norm=inf` makes every gradient NaN."""

    class Infinite(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                bias = model.transformer.ln_f.bias
                self.hook = bias.register_hook(lambda g: torch.full_like(g, torch.inf))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                self.hook.remove()

    callback = ClipCallback(QuantileClip, quantile=0.5)
    run = trainer(tmp_path, callback, Infinite())
    run.train()
    assert weights(run).isfinite().all()
    assert logged(run)[2]["grad_norm"] == torch.inf
    assert callback.clipper.metrics()["clip/nonfinite_total"] == 1
    assert callback.clipper.threshold().isfinite().all()


def test_resuming_without_the_history_warns(tmp_path):
    callback = ClipCallback(QuantileClip, **QUANTILE)
    trainer(tmp_path, callback, save_strategy="steps", save_steps=3).train()
    again = trainer(tmp_path, ClipCallback(QuantileClip, **QUANTILE))
    with pytest.warns(UserWarning, match="starts without its history"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("is_late", [False, True])
def test_other_settings_apply_to_a_resumed_run_with_a_warning(tmp_path, is_late):
    """Transformers makes another callback, with the settings of the checkpoint."""
    settings = {"max_norm": 0.5, "scope": "global"}
    first = ClipCallback(NormClip, **settings)
    trainer(tmp_path, first, save_strategy="steps", save_steps=3, max_steps=3).train()
    changed = ClipCallback(NormClip, **settings | {"max_norm": 0.25})
    given = () if is_late else (changed,)
    run = trainer(tmp_path, *given, restore_callback_states_from_checkpoint=True)
    if is_late:
        run.add_callback(changed)
    with pytest.warns(UserWarning, match=r"max_norm=0\.25 in place of 0\.5; to keep"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    entries = logged(run)
    assert [entry["clip/norm_after"] for entry in entries] == pytest.approx(
        [0.5] * 3 + [0.25] * 3
    )
    assert entries[-1]["clip/steps"] == 6


def test_a_history_of_another_meaning_is_refused_in_a_resumed_run(tmp_path):
    first = ClipCallback(NormClip, max_norm=0.5)
    trainer(tmp_path, first, save_strategy="steps", save_steps=3, max_steps=3).train()
    again = trainer(
        tmp_path,
        ClipCallback(QuantileClip, **QUANTILE),
        restore_callback_states_from_checkpoint=True,
    )
    with pytest.raises(ValueError, match=r"class is 'NormClip' in the state .*=False"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_functions_are_called_also_in_a_resumed_run(tmp_path):
    """A checkpoint does not hold them."""
    steps = []

    def make():
        return ClipCallback(
            NormClip, max_norm=0.5, on_clip=lambda decision, names, n: steps.append(n)
        )

    trainer(tmp_path, make(), save_strategy="steps", save_steps=3, max_steps=3).train()
    assert steps == [0, 1, 2]
    again = trainer(tmp_path, make(), restore_callback_states_from_checkpoint=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert steps == [0, 1, 2, 3, 4, 5]


def test_resuming_with_two_callbacks_warns(tmp_path):
    def run(**settings):
        kinds = ClipCallback(QuantileClip), ClipCallback(NormClip, max_norm=0.5)
        return trainer(tmp_path, *kinds, **settings)

    run(save_strategy="steps", save_steps=3, max_steps=3).train()
    again = run(restore_callback_states_from_checkpoint=True)
    with pytest.warns(UserWarning, match="cannot distinguish: give the trainer one"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_second_clipper_warns(tmp_path):
    callback = ClipCallback(QuantileClip, **QUANTILE)
    run = trainer(tmp_path, callback, max_grad_norm=1.0, max_steps=1)
    with pytest.warns(UserWarning, match="max_grad_norm=1.0. clips before"):
        run.train()
    (entry,) = logged(run)
    assert entry["grad_norm"] > 1  # before both
    assert entry["clip/norm"] == pytest.approx(1.0, rel=1e-4)


def test_the_limit_can_be_given_to_the_trainer_instead(tmp_path):
    """Threshold first: the trainer clips, and reports the norm afterwards."""

    class Limit(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            self.clipper = QuantileClip(model, **QUANTILE)

        def on_step_begin(self, args, state, control, **kwargs):
            args.max_grad_norm = min(self.clipper.threshold().item(), 1e9)

        def on_log(self, args, state, control, logs, **kwargs):
            if "grad_norm" in logs:
                self.clipper.observe(logs["grad_norm"])

    limited = trainer(tmp_path, Limit())
    limited.train()
    clipped = trainer(tmp_path, ClipCallback(QuantileClip, **QUANTILE))
    clipped.train()
    torch.testing.assert_close(weights(limited), weights(clipped), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["Nothing", torch.nn.Linear, partial(TrustClip)])
def test_a_clipper_that_no_checkpoint_can_name_is_refused(wrong):
    with pytest.raises(
        ValueError, match=r"one of AGC, AdaGC.*\(TrustClip, ratio=0.01\)"
    ):
        ClipCallback(wrong)


def test_deepspeed_is_refused_with_the_way_out(tmp_path):
    run = trainer(tmp_path)
    run.args.deepspeed = {"zero_optimization": {"stage": 1}}
    with pytest.raises(RuntimeError, match=r"threshold.* and clipper.observe"):
        ClipCallback(AGC).on_train_begin(run.args, run.state, run.control)


class Interrupt(transformers.TrainerCallback):
    """Stops a run once, as Ctrl-C does."""

    stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_is_clipped_once_in_the_next(tmp_path):
    callback = ClipCallback(QuantileClip, **QUANTILE)
    run = trainer(tmp_path, callback, Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    first = callback.clipper
    run.train()
    assert first is not callback.clipper
    assert first.metrics()["clip/steps"] == 2
    assert callback.clipper.metrics()["clip/steps"] == 6
    entries = logged(run)[-6:]
    for entry in entries:
        assert entry["clip/norm"] == pytest.approx(entry["grad_norm"], rel=1e-4)


def test_a_setting_that_json_cannot_hold_is_refused_at_once():
    with pytest.raises(TypeError, match=r"exclude must be a number, .* a policy"):
        ClipCallback(QuantileClip, exclude=re.compile("bias"))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_policy_receives_the_loss_that_the_trainer_logs(tmp_path, accumulation):
    callback = ClipCallback(NormClip, max_norm=0.5, loss_policy=Fixed(2.9))
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 3}
    run = trainer(tmp_path, callback, **settings)
    run.train()
    entries = logged(run)
    losses = [entry["loss"] for entry in entries]
    assert [entry["clip/loss"] for entry in entries] == pytest.approx(losses, rel=1e-3)
    skipped = sum(loss > 2.9 for loss in losses)
    assert entries[-1]["clip/loss_skipped_total"] == skipped
    assert not run.model._forward_hooks


def test_a_loss_that_the_model_does_not_return_is_an_error(tmp_path):
    callback = ClipCallback(NormClip, max_norm=0.5, loss_policy=Fixed(2.9))
    run = trainer(tmp_path, callback, label_smoothing_factor=0.1, max_steps=1)
    with pytest.raises(ValueError, match="the model must return the loss"):
        run.train()
