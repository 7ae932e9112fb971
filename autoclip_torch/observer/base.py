"""`BaseClipper`: the methods that every clipper has."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autoclip_core.checks import check_flag, format_error
from autoclip_core.clipper.fixed_settings import FixedSettings
from autoclip_torch.rows.read import ParametersLike, read_parameters
from autoclip_torch.rows.settings import StepCallback


class BaseClipper(FixedSettings, ABC):
    """A clipper: one `Observer`, or the two halves of a `TrustClip`."""

    _to_change_settings = (
        "call detach() and make a new clipper, which continues the history with "
        "load_state_dict(clipper.state_dict(), strict=False)"
    )

    @property
    def dry_run(self) -> bool:
        """Whether nothing is changed; it may be set between steps."""
        is_dry: bool = self._observers[0]._stepper.dry_run
        return is_dry

    @dry_run.setter
    def dry_run(self, value: bool) -> None:
        check_flag("dry_run", value)
        for observer in self._observers:
            observer._stepper.dry_run = value

    @property
    def on_clip(self) -> StepCallback | None:
        """A function that is called if a row was clipped, dropped or not finite.

        `on_clip(decision, names, step)` gets the decision on the CPU, the names of its
        rows, and the number of the step, `clip/steps` - 1. A skipped step calls
        `on_skip` instead. A copied or unpickled clipper has no functions.

        On the CPU the function is called in the step, when the norms are recorded and
        the gradients are scaled. On an accelerator, a step does not wait for its
        decision: the function is called for step k before step k + 1 ends, or by
        `metrics()`.

        An exception in the function propagates. The step is then recorded, and the
        gradients are scaled or removed, unless the kernel of a fused optimizer does
        that. If the clipper acts in `optimizer.step()`, the optimizer does not step. An
        `UpdateClipper` calls the function after the weights were clipped.

        >>> import torch
        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = NormClip([weight], 1.0)
        >>> clipper.on_clip = lambda decision, names, step: print(step, decision.norm)
        >>> for norm in [0.5, 4.0]:
        ...     weight.grad = torch.tensor([norm, 0.0])
        ...     decision = clipper.step()
        1 tensor([4.])
        """
        return self._get_callback("on_clip")

    @on_clip.setter
    def on_clip(self, function: StepCallback | None) -> None:
        self._set_callback("on_clip", function)

    @property
    def on_skip(self) -> StepCallback | None:
        """A function that is called if the update was skipped; see `on_clip`.

        >>> import torch
        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = NormClip([weight], 1.0, nonfinite="skip")
        >>> clipper.on_skip = lambda decision, names, step: print(names, step)
        >>> weight.grad = torch.tensor([float("nan"), 0.0])
        >>> decision = clipper.step()
        ['global'] 0
        """
        return self._get_callback("on_skip")

    @on_skip.setter
    def on_skip(self, function: StepCallback | None) -> None:
        self._set_callback("on_skip", function)

    def metrics(self, *, per_row: bool = False) -> dict[str, float]:
        """Return the metrics of the last step and of the run, in one transfer.

        After `load_state_dict` there is no last step. Until the next step, the norm is
        0 and the threshold is +inf. The counts continue. On an accelerator, `on_clip`
        or `on_skip` is first called for the last step.

        Args:
          per_row: whether to add norm, threshold, scale and clip rate of every row, as
            `clip/norm/<name>` and so on.

        Returns:
          The names of `autoclip_core.clipper.metrics.compute_metrics`, each a float.
          With a loss policy, also those of `autoclip_core.loss.compute_loss_metrics`.
          The names of an `UpdateClipper` begin with `clip/update_` in place of `clip/`.
          A `TrustClip` has both; the norms of its bound are root mean squares.

        Raises:
          RuntimeError: more than `max_consecutive_skips` updates in a row were skipped.

        >>> import torch
        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.metrics()["clip/norm"], clipper.metrics()["clip/clip_rate"]
        (3.0, 0.5)
        """
        parts = (observer._read_metrics(per_row) for observer in self._observers)
        return {name: value for part in parts for name, value in part.items()}

    def reset(self) -> None:
        """Delete the recorded norms and the counts, as if no step had been taken.

        >>> import torch
        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.reset()
        >>> clipper.threshold()
        tensor([inf])
        """
        for observer in self._observers:
            observer._stepper.reset()

    def detach(self) -> None:
        """Remove the clipper from its optimizer, if it acts in one. Its state remains.

        >>> import torch
        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = NormClip([weight], 1.0)
        >>> handle = clipper.attach(torch.optim.SGD([weight]))
        >>> clipper.detach()
        >>> handle.active
        False
        """
        for observer in self._observers:
            observer._detach()

    def remove_params(self, parameters: ParametersLike) -> None:
        """Remove parameters and their rows; the other rows keep their history.

        An optimizer that steps them must give them up, too.

        Args:
          parameters: a parameter, a module, or an iterable of parameters.

        Raises:
          ValueError: a parameter is not one of the clipper, or none would be left;
            nothing was changed.

        >>> import torch
        >>> from autoclip_torch import QuantileClip
        >>> head, body = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        >>> clipper = QuantileClip([("head", head), ("body", body)], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.remove_params([head])
        >>> clipper.names, clipper.threshold()
        (['body'], tensor([3.]))
        """
        given = read_parameters(parameters)
        for observer in self._observers:
            observer._parameters.remove(given)

    def replace_param(self, old: Tensor, new: Tensor) -> None:
        """Replace a parameter; the new one continues the history of the old one.

        An optimizer that steps the old one must step the new one instead. A clipper
        that knows its optimizer, or its module, does this by itself before the next
        step, if the name or the place in the optimizer is the same.

        Args:
          old: a parameter of the clipper.
          new: a parameter that the clipper does not have. It may have another shape; at
            scope="unit" it must have as many units.

        Raises:
          TypeError, ValueError: an argument breaks its rule; nothing was changed.

        >>> import torch
        >>> from autoclip_torch import QuantileClip
        >>> small, large = (torch.nn.Parameter(torch.zeros(n, 3)) for n in (2, 5))
        >>> clipper = QuantileClip([("points", small)], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.replace_param(small, large)
        >>> clipper.names, clipper.threshold()
        (['points'], tensor([2.]))
        """
        for observer in reversed(self._observers):  # the bound may refuse it
            observer._parameters.replace(old, new)

    @contextmanager
    def _undo_on_error(self) -> Iterator[None]:
        """Restore the state if an exception is raised while states load."""
        # On a device, loading overwrites the present tensors: a state dict is a copy.
        before = [
            (o, o.state_dict(), o._policy_states.decision) for o in self._observers
        ]
        try:
            yield
        except Exception:
            for observer, state, decision in before:
                observer.load_state_dict(state)
                observer._policy_states.decision = decision
            raise

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return everything that later thresholds depend on."""

    @property
    @abstractmethod
    def _observers(self) -> Sequence[Any]:
        """The observers that this is: itself, or the halves of a `TrustClip`."""

    def _get_callback(self, name: str) -> StepCallback | None:
        callbacks = self._observers[0]._stepper.callbacks
        function: StepCallback | None = getattr(callbacks, name)
        return function

    def _set_callback(self, name: str, function: StepCallback | None) -> None:
        if function is not None and not callable(function):
            rule = "a function of (decision, names, step), or None"
            raise TypeError(format_error(name, rule, function, ""))
        for observer in self._observers:
            setattr(observer._stepper.callbacks, name, function)
