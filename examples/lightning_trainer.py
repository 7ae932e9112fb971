"""Lightning: a callback clips inside each optimizer step and logs with the trainer.

Run it: `python examples/lightning_trainer.py`. Half of the epochs are trained, then a
second trainer resumes from the checkpoint, history included.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

# Lightning's own: a name that torch changed, and advice about loaders and resuming.
for message in ("LeafSpec", "does not have many workers", "Be aware that when using"):
    warnings.filterwarnings("ignore", message=f".*{message}")

import lightning.pytorch as pl  # noqa: E402

from autoclip_torch import QuantileClip  # noqa: E402
from autoclip_torch.lightning import ClipCallback  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # a table, no tips


class Regression(pl.LightningModule):
    """Learns the sum of its inputs; every tenth batch has tenfold targets."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader:
        torch.manual_seed(1)
        xs = [torch.randn(32, 8) for _ in range(40)]
        scale = [10.0 if i % 10 == 9 else 1.0 for i in range(40)]
        ys = [s * x.sum(1, keepdim=True) for x, s in zip(xs, scale, strict=True)]
        return DataLoader(list(zip(xs, ys, strict=True)), batch_size=None)


def train(
    epochs: int, save: Path | None = None, resume: Path | None = None
) -> tuple[Regression, ClipCallback]:
    """Train from the beginning, or from a checkpoint, history included."""
    clip = ClipCallback(QuantileClip, quantile=0.8, scope="global")
    trainer = pl.Trainer(  # gradient_clip_val stays out: the callback clips
        max_epochs=epochs,
        callbacks=[clip],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    model = Regression()
    trainer.fit(model, ckpt_path=resume, weights_only=resume is not None)
    if save is not None:
        trainer.save_checkpoint(save)  # weights, optimizer and the clipper's history
    return model, clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    epochs = parser.parse_args().epochs
    print("epochs  loss  steps  clipped  threshold")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"
        print_row(epochs // 2, *train(epochs // 2, save=path))
        print_row(epochs, *train(epochs, resume=path))


def print_row(epochs: int, model: Regression, clip: ClipCallback) -> None:
    x, y = next(iter(model.train_dataloader()))
    loss = nn.functional.mse_loss(model.net(x), y)
    (clipper,) = clip.clippers
    metrics = clipper.metrics()
    print(
        f"{epochs:6} {loss:5.2f} {metrics['clip/steps']:6.0f} "
        f"{metrics['clip/clip_rate']:8.0%} {metrics['clip/threshold']:10.2f}"
    )


if __name__ == "__main__":
    main()
