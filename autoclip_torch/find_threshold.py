"""Measure the gradient norms of a model before training, without changing the model."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoclip_core import Suggestion, suggest_threshold
from autoclip_core.checks import check_count

from .named import NormClip


def find_clipping_threshold(
    model: nn.Module,
    dataloader: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    num_batches: int = 100,
    *,
    norm: str = "l2",
) -> Suggestion:
    """Return the norms' statistics over some batches, a threshold and advice.

    Each batch runs forward and backward in training mode, without an update. Afterwards
    everything is restored, even if the loss raises: parameters, gradients (None stays
    None), buffers, the mode of each module, and the random states of Python, NumPy,
    torch and the loader.

    The norms depend on the state of the model. At initialisation they are often larger
    than later, so prefer a model that has trained for a few hundred steps.

    Args:
      model: the model; batches are moved to its device.
      dataloader: yields pairs `(inputs, target)`, or dicts of the arguments of `model`.
        An iterator is consumed as far as it is read.
      loss: a function of `(model(inputs), target)`; for a dict, of
        `(model(**batch), batch)`.
      num_batches: the largest number of batches, >= 1.
      norm: as in `Clipper`.

    Returns:
      The result of `suggest_threshold` for the norms of the whole gradient.

    Raises:
      TypeError: a batch is neither a pair nor a dict.
      ValueError: there is no batch, or no batch has a finite gradient.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = TensorDataset(torch.ones(8, 3), torch.zeros(8, 1))
    >>> model = nn.Linear(3, 1)
    >>> loader = DataLoader(data, batch_size=2)
    >>> suggestion = find_clipping_threshold(model, loader, nn.functional.mse_loss)
    >>> suggestion.steps, model.weight.grad
    (4, None)
    """
    check_count("num_batches", num_batches, 1)
    meter = NormClip(model.parameters(), max_norm=1.0, norm=norm, dry_run=True)
    device = next(model.parameters()).device
    norms = []
    with restore_model(model, dataloader), torch.enable_grad():
        model.train()
        for batch in islice(dataloader, num_batches):
            for parameter in model.parameters():
                parameter.grad = None
            value = compute_loss(model, move_batch(batch, device), loss)
            value.backward()  # type: ignore[no-untyped-call]
            norms.append(float(meter.step().norm))
    if not norms:
        raise ValueError(
            "dataloader must yield at least one batch, got none; an iterator that was "
            "read before is empty: pass the DataLoader itself"
        )
    return suggest_threshold(norms)


def compute_loss(
    model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor]
) -> Tensor:
    """Return the loss of one batch, a pair or a dict."""
    if isinstance(batch, Mapping):
        return loss(model(**batch), batch)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, target = batch
        return loss(model(inputs), target)
    raise TypeError(
        "dataloader must yield pairs (inputs, target) or dicts, got "
        f"{type(batch).__name__}; wrap it: ((x, x) for x in dataloader)"
    )


def move_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device; its tensors may be in dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: move_batch(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [move_batch(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else values
    return batch


@contextmanager
def restore_model(model: nn.Module, dataloader: Any) -> Iterator[None]:
    """Restore gradients, buffers, modes and random states at the end."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone() if buffer is not None else None)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    with restore_random_states(model, dataloader):
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    if buffer is not None and value is not None:
                        buffer.copy_(value)
                    module._buffers[name] = buffer


@contextmanager
def restore_random_states(model: nn.Module, dataloader: Any) -> Iterator[None]:
    """Restore, at the end, the generators that a loader or a layer may use."""
    batches = getattr(dataloader, "batch_sampler", None)
    samplers = [getattr(owner, "sampler", None) for owner in (dataloader, batches)]
    owners = (dataloader, batches, *samplers)
    generators = [getattr(owner, "generator", None) for owner in owners]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = {p.device for p in model.parameters() if p.device.type != "cpu"}
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            for device in devices:
                fork = torch.random.fork_rng([device.index], device_type=device.type)
                stack.enter_context(fork)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in states:
            generator.set_state(state)
