"""A clipper in plain Python and NumPy: what the tests of `autoclip_torch` compare with.

It cuts the rows by the words of the documentation, takes norms in float64 and asks the
oracle of `golden/` for the limits: nothing in it comes from the library. Beside it, the
table of the clippers that the tests go through, and a model to train with them.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_torch import (
    AGC,
    AdaGC,
    Clipper,
    NormClip,
    QuantileClip,
    StandardClip,
    ZClip,
)

from ..support.cases import oracle, policy_of

# The models are tiny: a second thread would only be waited for.
torch.set_num_threads(1)

SCOPES = ("parameter", "group", "global", "unit")
every_scope = pytest.mark.parametrize("scope", SCOPES)


class Case(NamedTuple):
    """A clipper, and its policy as the oracle calls it."""

    make: type
    keywords: dict
    code: str
    default_scope: str = "parameter"

    def __call__(self, parameters, **more):
        return self.make(parameters, **self.keywords, **more)


def generic(code):
    """The clipper that takes any policy."""
    return Case(Clipper, {"policy": policy_of(code)}, code)


# Windows and warm-ups are short, so that a short run fills and leaves them.
CLIPPERS = {
    "QuantileClip": Case(
        QuantileClip,
        {"quantile": 0.8, "history_length": 20},
        "Quantile(0.8, history_length=20)",
    ),
    "QuantileClip, the paper's": Case(
        QuantileClip,
        {"quantile": 0.3, "history_length": None, "include_current": True},
        "Quantile(0.3, history_length=None, include_current=True)",
    ),
    "QuantileClip, limited": Case(
        QuantileClip,
        {
            "quantile": 0.7,
            "history_length": 25,
            "warmup_steps": 6,
            "warmup_threshold": 0.4,
            "min_threshold": 0.05,
            "max_threshold": 1.5,
        },
        "Cap(Floor(Warmup(Quantile(0.7, history_length=25), steps=6, threshold=0.4),"
        " min_norm=0.05), max_norm=1.5)",
    ),
    "StandardClip": Case(
        StandardClip,
        {"deviations": 1.0, "history_length": 16},
        "MeanStd(1.0, history_length=16)",
    ),
    "StandardClip, of logarithms": Case(
        StandardClip,
        {"deviations": 1.5, "history_length": 24, "log": True, "ddof": 0},
        "MeanStd(1.5, history_length=24, log=True, ddof=0)",
    ),
    "AGC": Case(
        AGC, {"clipping": 0.5, "eps": 0.01}, "ParamRatio(0.5, eps=0.01)", "unit"
    ),
    "ZClip": Case(
        ZClip,
        {"z": 1.5, "alpha": 0.9, "warmup_steps": 10},
        "ZScore(1.5, alpha=0.9, warmup_steps=10)",
        "global",
    ),
    "ZClip, to the mean": Case(
        ZClip,
        {"z": 2.0, "warmup_steps": 5, "target": "mean", "record": "applied"},
        "ZScore(2.0, warmup_steps=5, target='mean', record='applied')",
        "global",
    ),
    "AdaGC": Case(
        AdaGC,
        {"ratio": 1.2, "beta": 0.9, "warmup_steps": 8, "warmup_threshold": 0.5},
        "EmaRatio(1.2, beta=0.9, warmup_steps=8, warmup_threshold=0.5)",
    ),
    "NormClip": Case(NormClip, {"max_norm": 0.5}, "Fixed(0.5)", "global"),
    "StreamingQuantile": generic("StreamingQuantile(0.7, rate=0.2)"),
    "Drop": generic("Drop(Quantile(0.8, history_length=20))"),
    "Drop, to skip": generic("Drop(Quantile(0.9, history_length=30), action='skip')"),
}
every_clipper = pytest.mark.parametrize("case", CLIPPERS.values(), ids=list(CLIPPERS))


class Expected(NamedTuple):
    """What one step has to give: one entry per row, and the gradients afterwards."""

    norm: np.ndarray
    threshold: np.ndarray
    scale: np.ndarray
    clipped: np.ndarray
    finite: np.ndarray
    skipped: np.ndarray
    gradients: list


class Reference:
    """A clipper over lists: rows, a policy for each, and `step()`.

    Args:
      shapes: those of the parameters.
      code: the policy; or one for each group.
      scope: as for a clipper.
      groups: the places of each group's parameters; None is one group of all.
      nonfinite: "zero", "skip" or "propagate".
    """

    def __init__(self, shapes, code, scope, groups=None, nonfinite="zero"):
        groups = groups or [range(len(shapes))]
        codes = code if isinstance(code, list) else [code] * len(groups)
        self.shapes, self.nonfinite = shapes, nonfinite
        self.rows, self.policies, self.cancels = [], [], []
        # The rows of one policy stand side by side, in the order of their groups.
        for one in dict.fromkeys(codes):
            members = [g for g, own in zip(groups, codes, strict=True) if own == one]
            rows = cut(shapes, scope, members)
            self.rows += rows
            self.policies += [oracle().evaluate(one) for _ in rows]
            self.cancels += ["skip" in one] * len(rows)

    def step(self, gradients, parameters):
        """Take arrays or None; say what must come out."""
        found = [values_of(row, gradients) for row in self.rows]
        weights = [values_of(row, parameters) for row in self.rows]
        seen = [values is not None for values in found]
        norms = [norm_of(values) if values is not None else 0.0 for values in found]
        finite = [math.isfinite(norm) for norm in norms]
        limits = [
            policy.limit(norm if ok else 0.0, norm_of(weight))
            for policy, norm, ok, weight in zip(
                self.policies, norms, finite, weights, strict=True
            )
        ]
        clipped = [
            ok and n > limit[0]
            for n, ok, limit in zip(norms, finite, limits, strict=True)
        ]
        bad = self.nonfinite == "skip" and not all(finite)
        over = any(c and k for c, k in zip(clipped, self.cancels, strict=True))
        scales = []
        for row, policy in enumerate(self.policies):
            if (bad or over) and seen[row]:
                scale = 0.0
            elif not finite[row]:
                scale = 1.0 if self.nonfinite == "propagate" else 0.0
            else:
                scale = limits[row][1] / norms[row] if clipped[row] else 1.0
            scales.append(scale)
            if seen[row] and finite[row] and norms[row] > 0 and not bad:
                policy.learn(norms[row])
        return Expected(
            np.array([n if s else np.nan for n, s in zip(norms, seen, strict=True)]),
            np.array([limit[0] for limit in limits]),
            np.array(scales),
            np.array(clipped),
            np.array(finite),
            np.full(len(seen), bad or over),
            self._scaled(gradients, scales, bad or over),
        )

    def _scaled(self, gradients, scales, skipped):
        after = [None if g is None or skipped else g.astype(float) for g in gradients]
        for row, scale in zip(self.rows, scales, strict=True):
            for place, index in row:
                if after[place] is not None and scale != 1:
                    after[place][index] = scale * after[place][index] if scale else 0.0
        return after


def cut(shapes, scope, groups):
    """The rows, each a list of (place of the parameter, index into its axis 0)."""
    if scope == "global":
        return [[(place, ...) for group in groups for place in group]]
    if scope == "group":
        return [[(place, ...) for place in group] for group in groups]
    places = [place for group in groups for place in group]
    if scope == "parameter":
        return [[(place, ...)] for place in places]
    return [
        [(place, index)]
        for place in places
        for index in (range(shapes[place][0]) if len(shapes[place]) > 1 else [...])
    ]


def values_of(row, arrays):
    """All numbers of a row in one vector; None where it has none."""
    parts = [
        arrays[place][index].ravel()
        for place, index in row
        if arrays[place] is not None
    ]
    return np.concatenate(parts) if parts else None


def norm_of(values):
    """The norm, added up in float64 and then rounded to float32."""
    return float(np.float32(np.sqrt(np.sum(np.square(values, dtype=np.float64)))))


def arrays(tensors):
    """Copies as NumPy arrays, None where there is no tensor."""
    return [None if t is None else t.detach().float().numpy().copy() for t in tensors]


def gradients_of(parameters):
    return [parameter.grad for parameter in parameters]


# A model to train.


def small_model(seed=0):
    """A network of 6 parameters, in which each kind of row holds something."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2))


def batches(steps, seed=1, spread=1.0):
    """Batches with a factor for the loss: gradients of heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        factor = torch.exp(spread * torch.randn((), generator=generator))
        yield x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1), factor


def backward(model, batch):
    """Fill the gradients of one batch."""
    x, y, factor = batch
    model.zero_grad()
    answer = model(x.to(next(model.parameters()).dtype))
    loss = factor * (answer - y[:, : answer.shape[1]]).square().mean()
    loss.backward()
    return loss


def spoil(parameters, rng):
    """Make some gradients wrong, zero or missing."""
    for parameter in parameters:
        lot = rng.random()
        if lot < 0.02:
            parameter.grad.view(-1)[-1] = math.nan
        elif lot < 0.04:
            parameter.grad.view(-1)[0] = -math.inf
        elif lot < 0.1:
            parameter.grad.zero_()
        elif lot < 0.2:
            parameter.grad = None


def train(model, clipper, steps, optimizer=None, seed=1):
    """A training loop; yields the step, the gradients before it, and the decision."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    for step, batch in enumerate(batches(steps, seed)):
        backward(model, batch)
        before = [p.grad.clone() for p in model.parameters()]
        decision = clipper.step()
        yield step, before, decision
        optimizer.step()


def bits(tensor):
    """The bits of a float32 tensor: -0.0 is not 0.0 there, and NaN is itself."""
    return tensor.detach().contiguous().view(torch.int32)


def check_same(one, other, path="state"):
    """Two states, decisions or lists of them are the same, tensors bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        one, other = (t.detach().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key, value in one.items():
            check_same(value, other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            check_same(*pair, f"{path}[{index}]")
    else:
        assert one == other, path


def check_decision(decision, expected, rtol=1e-5):
    """A decision against the reference."""
    np.testing.assert_allclose(decision.norm, expected.norm, rtol=2e-6)
    np.testing.assert_allclose(decision.threshold, expected.threshold, rtol=rtol)
    np.testing.assert_allclose(decision.scale, expected.scale, rtol=rtol)
    for name in ("clipped", "finite", "skipped"):
        np.testing.assert_array_equal(
            getattr(decision, name), getattr(expected, name), name
        )


def check_gradients(parameters, expected, rtol=1e-5):
    """The gradients afterwards against the reference."""
    for parameter, gradient in zip(parameters, expected.gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            np.testing.assert_allclose(parameter.grad, gradient, rtol=rtol)


def test_the_reference_agrees_with_a_calculation_by_hand():
    """Rows of norm 5 and 13, later half of them, clipped to the norms before."""
    shapes = [(2, 2), (2,)]
    weight, bias = np.float32([[3, 4], [5, 12]]), np.float32([8, 15])
    reference = Reference(shapes, "Quantile(1.0)", "unit")
    first = reference.step([weight, bias], [weight, bias])
    assert first.norm.tolist() == [5, 13, 17]
    assert first.threshold.tolist() == [math.inf] * 3
    second = reference.step([2 * weight, None], [weight, bias])
    np.testing.assert_array_equal(second.norm, [10, 26, np.nan])
    assert second.threshold.tolist() == [5, 13, 17]
    assert second.scale.tolist() == [0.5, 0.5, 1]
    assert second.gradients[0].tolist() == weight.tolist()
    assert second.gradients[1] is None
    together = Reference(shapes, "Fixed(6.5)", "global")
    assert together.step([weight / 13 * 5, bias * 0], 2 * [weight]).norm[0] == (
        pytest.approx(5 / 13 * math.hypot(5, 13))
    )


@pytest.mark.parametrize(
    ("scope", "rows"), [("parameter", 6), ("group", 1), ("global", 1), ("unit", 9)]
)
def test_the_model_has_rows_of_every_kind(scope, rows):
    shapes = [tuple(parameter.shape) for parameter in small_model().parameters()]
    assert len(Reference(shapes, "Fixed(1.0)", scope).rows) == rows
