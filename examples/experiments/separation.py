"""A small network that separates two voices, and AutoClip's paper's five losses."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from voices import BINS, Mixtures, istft, stft

HIDDEN, EMBEDDING = 32, 8
EPS = 1e-8


class Batch(NamedTuple):
    """Mixtures with their spectra: complex, shape (mixtures, [2,] frames, BINS)."""

    sources: Tensor
    mixed_spectra: Tensor
    source_spectra: Tensor

    @classmethod
    def of(cls, mixtures: Mixtures) -> "Batch":
        """Return the batch of some mixtures."""
        sources = mixtures.sources
        return cls(sources, stft(mixtures.mixed), stft(sources))


class Separator(nn.Module):
    """A bidirectional LSTM that gives each point of the spectrum masks and a place."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BINS, HIDDEN, batch_first=True, bidirectional=True)
        self.masks = nn.Linear(2 * HIDDEN, 2 * BINS)
        self.places = nn.Linear(2 * HIDDEN, EMBEDDING * BINS)

    def forward(self, spectra: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks (mixtures, 2, frames, BINS) and unit places (..., EMBEDDING)."""
        level = torch.log(spectra.abs() + 1e-5)
        states, _ = self.lstm((level - level.mean()) / level.std())
        shape = (*states.shape[:2], BINS)
        masks = torch.sigmoid(self.masks(states)).view(*shape, 2).permute(0, 3, 1, 2)
        places = self.places(states).view(*shape, EMBEDDING)
        return masks, nn.functional.normalize(places, dim=-1)


def best_order(errors: Callable[[Tensor], Tensor], sources: Tensor) -> Tensor:
    """Return the mean over mixtures of the smaller error of the two orders."""
    return torch.minimum(errors(sources), errors(sources.flip(1))).mean()


def mask_inference(masks: Tensor, places: Tensor, batch: Batch) -> Tensor:
    """Return the L1 error of the masked magnitudes, phase-sensitive and truncated."""
    mixed = batch.mixed_spectra.unsqueeze(1)
    phase = torch.cos(batch.source_spectra.angle() - mixed.angle())
    wanted = (batch.source_spectra.abs() * phase).clamp(min=0)
    wanted = torch.minimum(wanted, mixed.abs())
    found = masks * mixed.abs()
    return best_order(lambda w: (found - w).abs().mean(dim=(1, 2, 3)), wanted)


def memberships(places: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return weighted places V and one-hot owners Y, shape (mixtures, points, ...).

    A point weighs as the root of its share of the mixture's magnitude.
    """
    owner = batch.source_spectra.abs().argmax(dim=1).flatten(1)
    level = batch.mixed_spectra.abs().flatten(1)
    weight = (level / level.sum(dim=1, keepdim=True)).sqrt().unsqueeze(-1)
    one_hot = nn.functional.one_hot(owner, 2).float()
    return weight * places.flatten(1, 2), weight * one_hot


def deep_clustering(masks: Tensor, places: Tensor, batch: Batch) -> Tensor:
    """Return ‖VVᵀ − YYᵀ‖² without the large matrices."""
    v, y = memberships(places, batch)
    parts = ((v.mT @ v, 1), (v.mT @ y, -2), (y.mT @ y, 1))
    return sum(k * m.square().sum(dim=(1, 2)) for m, k in parts).mean()


def whitened_k_means(masks: Tensor, places: Tensor, batch: Batch) -> Tensor:
    """Return tr(I) − tr((VᵀV)⁻¹ VᵀY (YᵀY)⁻¹ YᵀV), the whitened k-means loss."""
    v, y = memberships(places, batch)
    cross = v.mT @ y
    inside = torch.linalg.solve(v.mT @ v + 1e-4 * torch.eye(EMBEDDING), cross)
    owners = torch.linalg.solve(y.mT @ y + 1e-4 * torch.eye(2), cross.mT)
    trace = (inside * owners.mT).sum(dim=(1, 2))
    return (EMBEDDING - trace).mean()


def chimera(masks: Tensor, places: Tensor, batch: Batch) -> Tensor:
    """Return 0.75 × whitened k-means + 0.25 × mask inference, as Chimera does."""
    clustering = whitened_k_means(masks, places, batch)
    return 0.75 * clustering + 0.25 * mask_inference(masks, places, batch)


def waveform(masks: Tensor, places: Tensor, batch: Batch) -> Tensor:
    """Return the negative signal-to-noise ratio of the waves, in dB."""
    sources = batch.sources
    found = istft(masks * batch.mixed_spectra.unsqueeze(1), sources.shape[-1])

    def errors(wanted: Tensor) -> Tensor:
        noise = (found - wanted).square().sum(dim=-1) + EPS
        power = wanted.square().sum(dim=-1) + EPS
        return -10 * torch.log10(power / noise).mean(dim=1)

    return best_order(errors, sources)


LOSSES: dict[str, Callable[[Tensor, Tensor, Batch], Tensor]] = {
    "DC": deep_clustering,
    "WKM": whitened_k_means,
    "MI": mask_inference,
    "MI + WKM": chimera,
    "SNR": waveform,
}
"""Their names in the paper's Table 1."""
