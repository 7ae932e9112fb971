"""`ClipCallback` with finders, replaced optimizers, one clipper, and both packages."""

import importlib.util
import sys

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    BatchSizeFinder,
    LearningRateFinder,
)
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402

import autoclip_torch.lightning  # noqa: E402
from autoclip_core import Fixed  # noqa: E402
from autoclip_torch import (  # noqa: E402
    Clipper,
    NormClip,
    QuantileClip,
    TrustClip,
)
from autoclip_torch.lightning import ClipCallback  # noqa: E402

from ...support.lightning_modules import (  # noqa: E402
    QUANTILE,
    WARNINGS,
    Automatic,
    Manual,
    OneBackward,
    TwoOptimizers,
    batches,
    trainer,
)

pytestmark = [
    *WARNINGS,
    pytest.mark.filterwarnings("ignore:.*lr_find"),
    pytest.mark.filterwarnings("ignore:.*You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*you have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*torch.load"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
]
LIMIT = 1e-3


class Tunable(Automatic):
    """It has what the finders change, and a validation."""

    lr, batch_size = 0.1, 2

    def train_dataloader(self):
        x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
        data = torch.utils.data.TensorDataset(x, y)
        return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def validation_step(self, batch, index):
        return self.training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class AtEpoch(LearningRateFinder):
    """Runs at the start of the second epoch, and at no other time."""

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def find_rate(run, module):
    Tuner(run).lr_find(module, num_training=4)


def find_size(run, module):
    Tuner(run).scale_batch_size(module, max_trials=1)


def validate(run, module):
    run.validate(module, verbose=False)


BEFORE_FIT = {
    "lr_find": (find_rate, []),
    "scale_batch_size": (find_size, []),
    "LearningRateFinder": (None, [LearningRateFinder(num_training_steps=4)]),
    "BatchSizeFinder": (None, [BatchSizeFinder(max_trials=1)]),
    "a finder in the second epoch": (None, [AtEpoch(num_training_steps=4)]),
    "validate": (validate, []),
}


@pytest.mark.parametrize("name", BEFORE_FIT)
def test_a_fit_clips_every_step_whatever_runs_before(tmp_path, name):
    """The history is that of the fit alone."""
    before, finders = BEFORE_FIT[name]
    callback = ClipCallback(QuantileClip, **QUANTILE)
    module = Tunable()
    run = trainer(tmp_path, *finders, callback, epochs=2, limit_val_batches=1)
    if before is not None:
        before(run, module)
    run.fit(module)
    (clipper,) = callback.clippers
    steps = run.global_step
    assert clipper.metrics()["clip/steps"] == steps > 6
    assert clipper.metrics()["clip/clip_rate"] > 0


def test_a_checkpoint_saved_before_the_first_step_is_resumed(tmp_path):
    class Saver(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    first = ClipCallback(QuantileClip, **QUANTILE)
    trainer(tmp_path, Saver(), first).fit(Automatic())
    second = ClipCallback(QuantileClip, **QUANTILE)
    resumed = trainer(tmp_path, second)
    resumed.fit(Automatic(), ckpt_path=tmp_path / "early.ckpt", weights_only=True)
    assert second.clippers[0].metrics() == first.clippers[0].metrics()
    assert second.clippers[0].metrics()["clip/steps"] == 6


def test_a_checkpoint_that_is_validated_leaves_the_next_fit_alone(tmp_path):
    """Its history belongs to other optimizers, here to another number of them."""
    one = trainer(tmp_path, ClipCallback(NormClip, max_norm=LIMIT))
    one.fit(Tunable())
    one.save_checkpoint(tmp_path / "one.ckpt")
    callback = ClipCallback(NormClip, max_norm=LIMIT)
    run, module = trainer(tmp_path, callback, limit_val_batches=1), Tunable()
    run.validate(module, ckpt_path=tmp_path / "one.ckpt", verbose=False)
    run.fit(module)
    assert callback.clippers[0].metrics()["clip/steps"] == run.global_step


class Swaps(pl.Callback):
    """Replaces the optimizers of the trainer once, at a certain hook."""

    def __init__(self, hook, replace):
        def run_once(trainer, pl_module, *args, **kwargs):
            if trainer.global_step >= 3 and not self.is_done:
                self.is_done = True
                replace(trainer, pl_module)

        self.is_done = False
        setattr(self, hook, run_once)


def set_up_again(trainer, pl_module):
    trainer.strategy.setup_optimizers(trainer)


def assign(trainer, pl_module):
    trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.1)]


def assign_half(trainer, pl_module):
    trainer.optimizers = [torch.optim.SGD([pl_module.net.bias], lr=0.1)]


def assign_renamed(trainer, pl_module):
    pl_module.net = torch.nn.Sequential(pl_module.net)
    assign(trainer, pl_module)


REPLACEMENTS = [
    ("on_train_batch_start", set_up_again, QuantileClip, QUANTILE),
    ("on_before_backward", assign, QuantileClip, QUANTILE),
    ("on_train_batch_start", assign, TrustClip, {"quantile": 0.5}),
]


@pytest.mark.parametrize(("hook", "replace", "kind", "settings"), REPLACEMENTS)
def test_a_replaced_optimizer_is_clipped_with_the_history(
    tmp_path, hook, replace, kind, settings
):
    """It has every step, and the norms of the steps before the replacement."""
    callback = ClipCallback(kind, **settings)
    recorded = Recorded(callback)
    trainer(tmp_path, Swaps(hook, replace), callback, recorded).fit(Automatic())
    metrics = callback.clippers[0].metrics()
    assert metrics["clip/steps"] == 6
    assert len(set(recorded.clippers)) == 2
    if kind is QuantileClip:
        ring = callback.clippers[0].state_dict()["states"][0]["ring"][0]
        assert ring[:6].tolist() == pytest.approx(recorded.norms)


class Recorded(pl.Callback):
    """The clipper of each step, and the norm that it measured."""

    def __init__(self, callback):
        self.callback, self.clippers, self.norms = callback, [], []

    def on_train_batch_end(self, *args):
        (clipper,) = self.callback.clippers
        self.clippers.append(clipper)
        self.norms.append(clipper.metrics()["clip/norm"])


def test_the_rows_in_common_continue_after_a_replacement(tmp_path):
    callback = ClipCallback(QuantileClip, quantile=0.5)  # a row per parameter
    swaps = Swaps("on_train_batch_end", assign_half)
    trainer(tmp_path, swaps, callback).fit(Automatic())
    assert callback.clippers[0].names == ["net.bias"]
    assert callback.clippers[0].state_dict()["tally"]["observed"].tolist() == [6]


def test_the_history_of_other_rows_is_not_used_and_that_is_said(tmp_path):
    callback = ClipCallback(QuantileClip, quantile=0.5)
    swaps = Swaps("on_train_batch_end", assign_renamed)
    words = r"starts without a history, .*only the state has net.weight, net.bias, only"
    with pytest.warns(UserWarning, match=words):
        trainer(tmp_path, swaps, callback).fit(Automatic())
    assert callback.clippers[0].metrics()["clip/steps"] == 3


def test_an_optimizer_replaced_within_a_batch_warns(tmp_path):
    class Swapping(Manual):
        def training_step(self, batch, index):
            if index == 3:
                assign(self.trainer, self)
            super().training_step(batch, index)

    callback = ClipCallback(NormClip, max_norm=LIMIT)
    with pytest.warns(UserWarning, match="within a batch, so its first step is not"):
        trainer(tmp_path, callback).fit(Swapping())
    assert callback.clippers[0].metrics()["clip/steps"] == 5


# One norm of several optimizers.


class Norms(pl.Callback):
    """The norm of all gradients when the last optimizer has stepped."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        gradients = [p.grad.flatten() for p in pl_module.parameters()]
        self.after.append(torch.cat(gradients).norm().item())


def test_one_clipper_measures_one_norm_of_all_optimizers(tmp_path):
    """As in a loop that calls one clipper of the whole model by hand."""
    callback = ClipCallback(QuantileClip, one_clipper=True, **QUANTILE)
    norms, module = Norms(), OneBackward()
    trainer(tmp_path, callback, norms).fit(module)
    (clipper,) = callback.clippers

    expected = OneBackward()
    optimizers = expected.configure_optimizers()
    by_hand = QuantileClip(expected, **QUANTILE)
    after = []
    for x, y in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = expected.net(x) + expected.other(x)
        torch.nn.functional.l1_loss(output, y).backward()
        decision = by_hand.step()
        after.append((decision.norm * decision.scale).item())
        for optimizer in optimizers:
            optimizer.step()
    assert norms.after == pytest.approx(after, rel=1e-5)
    assert clipper.metrics() == pytest.approx(by_hand.metrics())
    for p, q in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_one_clipper_warns_if_the_optimizers_step_after_different_passes(tmp_path):
    callback = ClipCallback(NormClip, max_norm=LIMIT, one_clipper=True)
    with pytest.warns(UserWarning, match="2 optimizers must step after each .* 1 did"):
        trainer(tmp_path, callback).fit(TwoOptimizers())


def test_one_clipper_refuses_a_scaler(tmp_path):
    callback = ClipCallback(NormClip, max_norm=LIMIT, one_clipper=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    with pytest.raises(ValueError, match="one_clipper must be False with a GradScaler"):
        trainer(tmp_path, callback, plugins=[plugin]).fit(OneBackward())


# The arguments.


WRONG = {
    "misspelt": ((QuantileClip,), {"quantil": 0.9}, TypeError, "quantil"),
    "percent": ((QuantileClip,), {"quantile": 90}, ValueError, r"mean 0\.9"),
    "missing": ((NormClip,), {}, TypeError, "max_norm"),
    "ratio": ((TrustClip,), {"ratio": -1.0}, ValueError, "ratio"),
    "scope": ((NormClip,), {"max_norm": 1.0, "scope": "layer"}, ValueError, "scope"),
    "group": (
        (NormClip,),
        {"max_norm": 1.0, "process_group": "x"},
        TypeError,
        r"process_group must be a torch.distributed.ProcessGroup .*got 'x'",
    ),
    "function": ((NormClip,), {"max_norm": 1.0, "on_clip": 3}, TypeError, "on_clip"),
    "replicated": (
        (NormClip,),
        {"max_norm": 1.0, "replicated": ["*"]},
        ValueError,
        "together with process_group",
    ),
    "exclude": ((NormClip,), {"max_norm": 1.0, "exclude": [3]}, TypeError, "exclude"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_a_wrong_argument_is_refused_when_the_callback_is_made(name, package):
    from autoclip_torch import transformers

    make = ClipCallback if package == "lightning" else transformers.ClipCallback
    arguments, keywords, kind, text = WRONG[name]
    state = torch.random.get_rng_state()
    with pytest.raises(kind, match=text):
        make(*arguments, **keywords)
    assert torch.equal(torch.random.get_rng_state(), state)


def make_clipper(groups, limit):
    return Clipper(groups, Fixed(limit))


def test_a_function_and_its_keywords_are_checked_when_the_callback_is_made():
    assert ClipCallback(make_clipper, limit=1.0).clippers == []
    with pytest.raises(TypeError, match=r"function for which missing a .*'limit'"):
        ClipCallback(make_clipper)
    with pytest.raises(TypeError, match="TrustClip, which clips inside each optimizer"):
        ClipCallback(TrustClip, one_clipper=True)


# `pytorch_lightning`: the same code under its other name.


def test_a_trainer_of_pytorch_lightning_clips_and_does_not_warn(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Model(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        training_step = Automatic.training_step
        train_dataloader = Automatic.train_dataloader

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = ClipCallback(NormClip, max_norm=LIMIT)
    run = trainer(tmp_path, callback, package=other)
    model = Model()
    run.fit(model)
    assert callback.clippers[0].metrics()["clip/steps"] == 6
    assert model.net.weight.grad.norm() <= 1.001 * LIMIT


@pytest.mark.parametrize("installed", [["pytorch_lightning"], []])
def test_either_package_is_enough(monkeypatch, installed):
    pytest.importorskip("pytorch_lightning")
    for name in {"lightning", "pytorch_lightning"} - set(installed):
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Without(name), *sys.meta_path])
    spec = importlib.util.spec_from_file_location(
        "autoclip_torch.lightning_copy", autoclip_torch.lightning.__file__
    )
    module = importlib.util.module_from_spec(spec)
    if not installed:
        with pytest.raises(ModuleNotFoundError, match="Lightning: pip install light"):
            spec.loader.exec_module(module)
        return
    spec.loader.exec_module(module)
    assert module.pl.__name__ == "pytorch_lightning"
    module.ClipCallback(NormClip, max_norm=1.0)


class Without:
    """Hides a package from the import system."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)
