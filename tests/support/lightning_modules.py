"""Lightning modules with one layer, a trainer for them, and its usual warnings."""

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch")

WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*treespec"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists"),
]
"""The warnings of Lightning that a test ignores."""

QUANTILE = {"quantile": 0.5, "history_length": 8, "scope": "global"}
TRUST = {"ratio": 0.05, "quantile": 0.5, "history_length": 8}


def batches(steps=6):
    torch.manual_seed(1)
    return [(torch.randn(4, 3) * 3**i, torch.randn(4, 1)) for i in range(steps)]


class Automatic(pl.LightningModule):
    fused = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(3, 1)

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.l1_loss(self.net(x), y)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(batches(), batch_size=None)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1, fused=self.fused)


class Fused(Automatic):
    fused = True


class ByHand:
    """Makes a module step its optimizer by hand; it stands before the module."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()


class Manual(ByHand, Automatic):
    """Steps its optimizer by hand."""


class TwoOptimizers(Automatic):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.other = torch.nn.Linear(3, 1)

    def training_step(self, batch, index):
        x, y = batch
        for net, optimizer in zip(
            (self.net, self.other), self.optimizers(), strict=True
        ):
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.l1_loss(net(x), y))
            optimizer.step()

    def configure_optimizers(self):
        nets = (self.net, self.other)
        return [torch.optim.Adam(net.parameters(), lr=0.1) for net in nets]


class OneBackward(TwoOptimizers):
    def training_step(self, batch, index):
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        output = self.net(x) + self.other(x)
        self.manual_backward(torch.nn.functional.l1_loss(output, y))
        for optimizer in self.optimizers():
            optimizer.step()


def trainer(folder, *callbacks, epochs=1, package=pl, **settings):
    return package.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        callbacks=list(callbacks),
        logger=settings.pop("logger", False),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, **settings},
    )
