"""The diagnosis of a run from its norms."""

import math

import numpy as np

from autoclip_core.series.diagnosis import diagnose

NAN = math.nan


def test_the_steps_are_those_of_the_log():
    norms = np.repeat([1.0, 1e6], [90, 20])
    diagnosis = diagnose(norms, steps=50 * np.arange(110))
    assert (diagnosis.verdict, diagnosis.step) == ("diverged", 4500)
    assert diagnosis.healthy.tolist() == [True] * 90 + [False] * 20
