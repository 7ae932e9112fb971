"""Gradients of given norms, and a loop that steps our clipper and another one."""

import math

import numpy as np
import torch
from torch import nn

SHAPES = [(3, 4), (3,), (2, 3, 2)]


def make_parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)


def gradients(norms, shapes=SHAPES):
    """Yield a list of gradients for each step.

    Args:
      norms: shape (steps,) for the norm of all, or (steps, parameters).
      shapes: one for each parameter.
    """
    generator = torch.Generator().manual_seed(2)
    for norm in norms:
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        if np.ndim(norm):
            sizes = [
                float(n / d.norm().double()) for n, d in zip(norm, drawn, strict=True)
            ]
        else:
            total = math.sqrt(sum(float(d.double().square().sum()) for d in drawn))
            sizes = [float(norm) / total] * len(drawn)
        yield [d * size for d, size in zip(drawn, sizes, strict=True)]


def set_gradients(parameters, grads):
    for parameter, gradient in zip(parameters, grads, strict=True):
        parameter.grad = gradient.clone()


def compare(clipper, ours, clip, theirs, given, rtol=3e-6):
    """Step both clippers and compare the scaled gradients and the decisions.

    Args:
      clipper: our clipper of the parameters `ours`.
      ours: our parameters.
      clip: takes a step of the peer.
      theirs: its parameters.
      given: lists of gradients.
      rtol: the largest relative difference.

    Returns:
      The decisions at finite norms.
    """
    decisions = []
    for grads in given:
        set_gradients(ours, grads)
        decision = clipper.step()
        if not decision.finite.all():
            assert not any(p.grad.any() for p in ours)
            continue
        set_gradients(theirs, grads)
        clip()
        before = torch.cat([g.flatten() for g in grads])
        scaled = [torch.cat([p.grad.flatten() for p in ps]) for ps in (ours, theirs)]
        torch.testing.assert_close(*scaled, rtol=rtol, atol=0)
        is_scaled = [bool(((s / before - 1).abs() > 2 * rtol).any()) for s in scaled]
        assert is_scaled[0] == is_scaled[1]
        assert bool(decision.clipped.any()) >= is_scaled[0]
        decisions.append(decision)
    rate = np.mean([d.clipped.float().mean() for d in decisions])
    assert 0.005 < rate < 0.995
    return decisions


def make_pair(shapes=SHAPES):
    return make_parameters(shapes), make_parameters(shapes)


def follow(rule, parameters):
    """Return a step that scales all gradients as one of `other_rules` says."""

    def clip():
        _, scale = next(rule)
        for parameter in parameters:
            parameter.grad *= scale

    return clip


def finite(norms):
    return norms[np.isfinite(norms)].tolist()
