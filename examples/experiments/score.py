"""How well a network separates: the gain in signal-to-distortion ratio."""

import torch
from torch import Tensor, nn

from separation import EMBEDDING, EPS, Batch, Separator
from voices import istft


def cluster(places: Tensor, batch: Batch) -> Tensor:
    """Return binary masks from two means over the places of each mixture."""
    points = places.flatten(1, 2)
    level = batch.mixed_spectra.abs().flatten(1).unsqueeze(-1)
    first = points.gather(1, level.argmax(dim=1, keepdim=True).expand(-1, 1, EMBEDDING))
    far = (points * first).sum(dim=-1, keepdim=True) - level / level.amax(1, True)
    second = points.gather(1, far.argmin(dim=1, keepdim=True).expand(-1, 1, EMBEDDING))
    centers = torch.cat([first, second], dim=1)
    for _ in range(10):
        owner = nn.functional.one_hot((points @ centers.mT).argmax(-1), 2).float()
        centers = (owner * level).mT @ points
        centers = nn.functional.normalize(centers, dim=-1)
    masks = owner.view(*places.shape[:3], 2)
    return masks.permute(0, 3, 1, 2)


@torch.no_grad()
def improvement(model: Separator, loss: str, batch: Batch) -> float:
    """Return the mean gain in scale-invariant signal-to-distortion ratio, in dB.

    Losses without a mask separate by clustering the places.
    """
    masks, places = model(batch.mixed_spectra)
    if loss in ("DC", "WKM"):
        masks = cluster(places, batch)
    samples = batch.sources.shape[-1]
    mixed = batch.mixed_spectra.unsqueeze(1)
    found = istft(masks * mixed, samples)
    before = si_sdr(batch.sources.sum(1, keepdim=True), batch.sources).mean(1)
    orders = [si_sdr(found, s).mean(1) for s in (batch.sources, batch.sources.flip(1))]
    return float((torch.maximum(*orders) - before).mean())


def si_sdr(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the scale-invariant signal-to-distortion ratio of waves, in dB."""
    scale = (found * wanted).sum(-1, keepdim=True)
    target = scale / (wanted.square().sum(-1, keepdim=True) + EPS) * wanted
    noise = (found - target).square().sum(-1) + EPS
    return 10 * torch.log10(target.square().sum(-1) / noise + EPS)
