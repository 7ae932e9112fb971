"""Synthetic two-speaker mixtures: harmonic voices with syllables, formants and breath.

No recording is needed. A voice is a sum of harmonics of a gliding fundamental, shaped
by three formants that move from syllable to syllable, with pauses and a little noise.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

RATE = 4000
"""Samples per second."""

WINDOW, HOP = 128, 32
"""Of the short-time Fourier transform: 32 and 8 ms, as in AutoClip's paper."""

LEVEL = 0.05
"""The root mean square of a voice, as in common recordings within [-1, 1]."""

BINS = WINDOW // 2 + 1
PITCHES = {"low": (85.0, 140.0), "high": (170.0, 260.0)}
"""The range of each kind of voice's mean pitch, in hertz."""


class Mixtures(NamedTuple):
    """Waves of shape (mixtures, samples) and (mixtures, 2, samples)."""

    mixed: Tensor
    sources: Tensor


def make_voice(rng: Any, samples: int, kind: str) -> Any:
    """Return one voice of unit power."""
    syllable = int(rng.uniform(0.12, 0.25) * RATE)
    count = samples // syllable + 2
    places = np.arange(samples) / syllable + rng.random()
    knots = np.arange(count + 1)
    glide = np.interp(places, knots, rng.uniform(0.9, 1.1, count + 1))
    pitch = rng.uniform(*PITCHES[kind]) * glide
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    loud = np.interp(places, knots, rng.random(count + 1) > 0.25)
    loud *= 0.3 + 0.7 * np.sin(np.pi * (places % 1)) ** 2
    formants = [
        np.interp(places, knots, rng.uniform(low, high, count + 1))
        for low, high in ((250, 800), (800, 1400), (1400, 1900))
    ]
    wave = 0.02 * rng.normal(size=samples)
    for harmonic in range(1, int(RATE / 2 / pitch.max())):
        frequency = harmonic * pitch
        gain = sum(np.exp(-(((frequency - f) / 150) ** 2)) for f in formants)
        wave += (gain + 0.05) / harmonic**0.5 * np.sin(harmonic * phase)
    wave *= loud
    return wave / (np.sqrt(np.mean(wave**2)) + 1e-8)


def make_mixtures(seed: int, count: int, samples: int) -> Mixtures:
    """Return mixtures of a low and a high voice, within 2.5 dB of each other."""
    rng = np.random.default_rng(seed)
    sources = np.empty((count, 2, samples), np.float32)
    for pair in sources:
        for channel, kind in enumerate(PITCHES):
            gain = LEVEL * 10 ** (rng.uniform(-1.25, 1.25) / 20)
            pair[channel] = gain * make_voice(rng, samples, kind)
    found = torch.from_numpy(sources)
    return Mixtures(found.sum(dim=1), found)


def window() -> Tensor:
    """Return the root of Hann's window."""
    return torch.hann_window(WINDOW).sqrt()


def stft(waves: Tensor) -> Tensor:
    """Return complex spectra, shape (..., frames, BINS): a full sine has 1/2."""
    flat = waves.reshape(-1, waves.shape[-1])
    spectra = torch.stft(flat, WINDOW, HOP, window=window(), return_complex=True)
    return spectra.mT.reshape(*waves.shape[:-1], -1, BINS) / window().sum()


def istft(spectra: Tensor, samples: int) -> Tensor:
    """Return the waves of spectra."""
    flat = spectra.reshape(-1, *spectra.shape[-2:]).mT * window().sum()
    waves = torch.istft(flat, WINDOW, HOP, window=window(), length=samples)
    return waves.reshape(*spectra.shape[:-2], samples)
