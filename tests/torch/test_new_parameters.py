"""Trainers add parameters to an optimizer later, or do not step all of them."""

import pytest
import torch
from torch import nn

pl = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")

from lightning.pytorch.callbacks import (  # noqa: E402
    BackboneFinetuning,
    BaseFinetuning,
)

from autoclip_torch import NormClip, QuantileClip, TrustClip  # noqa: E402
from autoclip_torch.lightning import ClipCallback  # noqa: E402
from autoclip_torch.trainers.create_clipper import create_clipper  # noqa: E402
from autoclip_torch.transformers import ClipCallback as HFClipCallback  # noqa: E402

from ..support.lightning_modules import ByHand  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]

QUANTILE = {"quantile": 0.5, "history_length": 8}
LR = 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x, y):
        return {"loss": (self.head(self.backbone(x)) - y).square().mean()}


def rows(count=12):
    torch.manual_seed(1)
    return [
        {"x": torch.randn(3) * 2 ** (i % 5), "y": torch.ones(1)} for i in range(count)
    ]


def length(model, before):
    """Return the distance of the weights from earlier ones, over the learning rate."""
    moved = [
        p.detach() - old for p, old in zip(model.parameters(), before, strict=True)
    ]
    return torch.cat([m.flatten() for m in moved]).norm().item() / LR


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


class Module(pl.LightningModule):
    """Trains the unfrozen parameters, and records the length of each update."""

    fused = False

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.backbone = self.net.backbone
        self.moves = []

    def training_step(self, batch, index):
        self.before = copies(self.net)
        return self.net(**batch)["loss"]

    def on_train_batch_end(self, *args):
        self.moves.append(length(self.net, self.before))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(rows(), batch_size=2)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=LR, fused=self.fused)


class Fused(Module):
    fused = True


class Manual(ByHand, Module):
    """Steps its optimizer by hand."""


class Unfreeze(BaseFinetuning):
    """Like Lightning's own callback, but a resumed backbone is trained, too."""

    def freeze_before_training(self, module):
        self.freeze(module.backbone)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=LR)
        elif epoch > 1:
            self.make_trainable(module.backbone)


def lightning_run(folder, module, *callbacks, epochs=2, path=None):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, ckpt_path=path, weights_only=True if path else None)
    return trainer


@pytest.mark.parametrize("kind", [Module, Manual, Fused])
@pytest.mark.parametrize("clip_last", [False, True])
def test_unfrozen_parameters_are_clipped(tmp_path, kind, clip_last):
    clip = ClipCallback(NormClip, max_norm=1e-3)
    finetune = BackboneFinetuning(
        unfreeze_backbone_at_epoch=1,
        backbone_initial_lr=LR,
        backbone_initial_ratio_lr=1,
    )
    both = [finetune, clip] if clip_last else [clip, finetune]
    module = kind()
    start = copies(module.backbone)
    lightning_run(tmp_path, module, *both)
    assert max(module.moves) == pytest.approx(1e-3, rel=1e-3)
    assert length(module.backbone, start) > 1e-4


class Late(pl.Callback):
    """Runs after the clipper's callback, and unfreezes after the batch has started."""

    def setup(self, trainer, module, stage):
        module.backbone.requires_grad_(False)

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 3:
            module.backbone.requires_grad_(True)
            added = {"params": list(module.backbone.parameters())}
            trainer.optimizers[0].add_param_group(added)


@pytest.mark.parametrize("kind", [Module, Manual, Fused])
def test_parameters_unfrozen_in_a_batch_are_clipped_in_that_batch(tmp_path, kind):
    module = kind()
    clip = ClipCallback(NormClip, max_norm=1e-3)
    lightning_run(tmp_path, module, clip, Late(), epochs=1)
    assert module.moves == pytest.approx([1e-3] * 6, rel=1e-3)


class NewHead(pl.Callback):
    """Replaces the head, in the model and in the optimizer, in the midst of a run."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 3:
            module.net.head = nn.Linear(3, 1)
            (group,) = trainer.optimizers[0].param_groups
            group["params"] = list(module.net.parameters())


@pytest.mark.parametrize("kind", [TrustClip, NormClip])
def test_a_replaced_head_is_clipped_and_continues_its_history(tmp_path, kind):
    arguments = {} if kind is TrustClip else {"max_norm": 1e-3, "scope": "parameter"}
    module, clip = Module(), ClipCallback(kind, **arguments)
    lightning_run(tmp_path, module, clip, NewHead(), epochs=1)
    (clipper,) = clip.clippers
    head = ["net.backbone.weight", "net.backbone.bias", "net.head.weight"]
    assert clipper.names == [*head, "net.head.bias"]
    metrics = clipper.metrics(per_row=True)
    assert all(v > 0 for k, v in metrics.items() if k.startswith("clip/norm/net.head"))
    if kind is NormClip:
        assert module.moves == pytest.approx([2e-3] * 6, rel=1e-3)
        assert clipper.state_dict()["tally"]["observed"].tolist() == [6] * 4


@pytest.mark.parametrize("scope", ["global", "parameter", "group"])
def test_a_run_resumed_after_unfreezing_has_the_same_bits(tmp_path, scope):
    def clip():
        return ClipCallback(QuantileClip, **QUANTILE, scope=scope)

    whole, through = Module(), clip()
    lightning_run(tmp_path, whole, through, Unfreeze(), epochs=4)
    half = lightning_run(tmp_path, Module(), clip(), Unfreeze(), epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, second = Module(), clip()
    path = tmp_path / "half.ckpt"
    lightning_run(tmp_path, resumed, second, Unfreeze(), epochs=4, path=path)
    (resumed_clipper,), (whole_clipper,) = second.clippers, through.clippers
    assert resumed_clipper.names == whole_clipper.names
    assert resumed_clipper.metrics(per_row=True) == whole_clipper.metrics(per_row=True)
    assert resumed_clipper.metrics()["clip/clip_rate"] > 0
    for got, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_existing_rows_keep_their_history(tmp_path):
    clip = ClipCallback(QuantileClip, **QUANTILE)
    lightning_run(tmp_path, Module(), clip, Unfreeze(), epochs=2)
    (clipper,) = clip.clippers
    backbone = ["net.backbone.weight", "net.backbone.bias"]
    assert clipper.names == ["net.head.weight", "net.head.bias", *backbone]
    counts = clipper.state_dict()["tally"]["observed"].tolist()
    assert counts == [12, 12, 6, 6]


def test_exclude_may_name_a_parameter_that_is_still_frozen(tmp_path):
    clip = ClipCallback(NormClip, max_norm=1e-3, exclude=["net.backbone"])
    module = Module()
    lightning_run(tmp_path, module, clip, Unfreeze())
    assert max(module.moves[:6]) == pytest.approx(1e-3, rel=1e-3)
    assert max(module.moves[6:]) > 0.1


def test_exclude_must_name_something(tmp_path):
    clip = ClipCallback(NormClip, max_norm=1.0, exclude=["net.tail"])
    with pytest.raises(
        ValueError, match=r"parameter's name, got 'net.tail'; the names are "
    ):
        lightning_run(tmp_path, Module(), clip)


class HFUnfreeze(transformers.TrainerCallback):
    """Adds the backbone to the optimizer after two steps; records update lengths."""

    def __init__(self):
        self.moves = []

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.before = copies(model)
        if state.global_step == 2 and not model.backbone.weight.requires_grad:
            model.backbone.requires_grad_(True)
            optimizer.add_param_group({"params": list(model.backbone.parameters())})

    def on_step_end(self, args, state, control, model, **kwargs):
        self.moves.append(length(model, self.before))


def hf_run(folder, model, parameters, clip):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=5,
        max_grad_norm=0,
        logging_strategy="no",
    )
    optimizer = torch.optim.SGD(parameters, lr=LR)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    watch = HFUnfreeze()
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=rows(),
        callbacks=[clip, watch],
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    return watch.moves


def test_hugging_face_clips_added_parameters(tmp_path):
    model = Net()
    model.backbone.requires_grad_(False)
    start = copies(model.backbone)
    clip = HFClipCallback(NormClip, max_norm=1e-3, exclude=None)
    moves = hf_run(tmp_path, model, model.head.parameters(), clip)
    assert moves == pytest.approx([1e-3] * 5, rel=1e-3)
    assert length(model.backbone, start) > 1e-4


def test_hugging_face_with_an_optimizer_of_the_head(tmp_path):
    """The backbone has gradients, but no optimizer steps it."""
    model = Net()
    start = copies(model.backbone)
    clip = HFClipCallback(NormClip, max_norm=1e-3)
    moves = hf_run(tmp_path, model, model.head.parameters(), clip)
    assert moves == pytest.approx([1e-3] * 5, rel=1e-3)
    assert length(model.backbone, start) == 0


class Quantized(Net):
    """A model with a frozen integer weight, as 4-bit and 8-bit loading leaves it."""

    def __init__(self):
        super().__init__()
        whole = torch.ones(3, 3, dtype=torch.int8)
        self.frozen = nn.Parameter(whole, requires_grad=False)
        self.backbone.requires_grad_(True)


def test_a_frozen_quantized_weight_is_ignored(tmp_path):
    model = Quantized()
    clip = HFClipCallback(NormClip, max_norm=1e-3)
    moves = hf_run(tmp_path, model, model.head.parameters(), clip)
    assert moves == pytest.approx([1e-3] * 5, rel=1e-3)


def test_an_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(Net().parameters(), lr=LR)
    with pytest.raises(ValueError, match="got a SGD that steps none of them"):
        create_clipper(QuantileClip, {}, [optimizer], Net())


def test_added_parameters_have_the_units_of_their_layer():
    model = nn.Sequential(nn.Linear(2, 4), nn.ConvTranspose1d(4, 6, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=LR)
    clipper = create_clipper(QuantileClip, {"scope": "unit"}, [optimizer], model)
    clipper.attach(optimizer)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert sum(name.startswith("1.weight") for name in clipper.names) == 6
