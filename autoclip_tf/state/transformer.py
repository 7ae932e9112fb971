"""What a transformer with a state is to an optimizer, and how its state is read."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

import keras

from autoclip_core import Decision
from autoclip_core.clipper import metrics
from autoclip_core.clipper.fixed_settings import FixedSettings
from autoclip_core.clipper.metrics import Tally
from autoclip_core.clipper.metrics_checks import (
    ClippedBeforeCheck,
    NonfiniteCheck,
    NoStepCheck,
)
from autoclip_tf.gradients.rows import Rows

from .settings import Settings
from .variables import ClipperState, MakeVariable, StateVariables, check_state

# On TensorFlow a checkpoint follows the attributes of a `tf.Module`.
_Module: Any = object
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    _Module = tf.Module

CHANGE_SETTINGS = (
    "make a new optimizer with a new clipper and compile the model with it, because "
    "the compiled step keeps its clipper"
)
"""What to do instead of assigning a setting."""

_Method = TypeVar("_Method", bound=Callable[..., Any])


def without_autograph(method: _Method) -> _Method:
    """Return a method that `tf.function` traces as it is.

    No branch of a step depends on a tensor. AutoGraph would convert a hundred functions
    to find that out, which takes 3 seconds.
    """
    if keras.backend.backend() != "tensorflow":
        return method
    unconverted: _Method = tf.autograph.experimental.do_not_convert(method)
    return unconverted


class StatefulTransformer(FixedSettings, _Module):  # type: ignore[misc]
    """A gradient transformer with a state: the part of a clipper that reads the state.

    A subclass has `_build_without_later(variables, make)`, which sets `_rows` and
    `_state`. `_add_later_variables(make)` then completes the state.
    """

    _to_change_settings = CHANGE_SETTINGS

    clips_update = False
    """Whether it acts after the optimizer's step, by `clip_update`; else it receives
    the gradients before the step."""

    is_behind = False
    """Whether another clipper of this package clips the same gradients before it."""

    class_name: str
    """The class that messages name: its own, or that of its pair."""

    _settings: Settings
    _rows: Rows | None = None
    _state: StateVariables
    _no_step: NoStepCheck
    _nonfinite: NonfiniteCheck
    _clipped_before: ClippedBeforeCheck

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        """Refuse a loss policy, which has to cancel updates."""
        if "loss_policy" in keywords:
            raise TypeError(
                f"loss_policy is no argument of {cls.__name__}: a gradient transformer "
                "cannot cancel an update; in a training loop of your own, decide with "
                "autoclip_core.loss.decide_loss and leave optimizer.apply out"
            )
        made: Self = super().__new__(cls)
        made.class_name = cls.__name__
        made._no_step, made._clipped_before = NoStepCheck(), ClippedBeforeCheck()
        made._start_counts()
        return made

    @property
    def built(self) -> bool:
        """Whether the clipper was built for its variables."""
        return self._rows is not None

    @property
    def dry_run(self) -> bool:
        """Whether it measures, decides and records, but changes nothing."""
        return self._settings.dry_run

    @property
    def names(self) -> list[str]:
        """The name of each row, in the order of a decision's entries."""
        return list(self._built_rows().names)

    @property
    def decision(self) -> Decision:
        """The last decision, in NumPy, with one entry per row (see `names`)."""
        return self._read_numpy().decision

    def metrics(self, *, per_row: bool = False) -> dict[str, float]:
        """Return what to log of the last step and of the run.

        Args:
          per_row: whether to add norm, threshold, scale and clip rate of every row, as
            `clip/norm/<path>` and so on.

        Returns:
          The names of `autoclip_core.clipper.metrics.compute_metrics`, each a float.

        Raises:
          ValueError: the clipper is not built.

        >>> from autoclip_tf import NormClip
        >>> weight, clip = keras.Variable([0.0]), NormClip(2.0)
        >>> pairs = clip([(keras.ops.convert_to_tensor([4.0]), weight)])
        >>> clip.metrics()["clip/norm"], clip.metrics()["clip/norm_after"]
        (4.0, 2.0)
        """
        decision, tally, _ = self._read_numpy()
        rows = self._built_rows()
        totals = metrics.compute_totals(decision, norm=rows.norm, sizes=rows.sizes)
        others = int(self.is_behind and not (self.clips_update or self.dry_run))
        numbers = metrics.compute_metrics(
            decision, tally, totals=totals, other_clippers=others
        )
        if per_row:
            numbers |= metrics.compute_row_metrics(self.names, decision, tally)
        values = {name: float(value) for name, value in numbers.items()}
        self._check_is_called(values["clip/steps"])
        self._check_nonfinite(tally)
        if not (self.clips_update or self.dry_run):
            self._check_norm(values["clip/norm"])
            self._check_steps(values["clip/steps"])
        return values

    def _check_is_called(self, steps: float) -> None:
        """Warn once if the metrics are read and nothing calls it."""
        read_weights = self._built_rows().read_weights
        way_out = f"{self._place}, and step with it"
        self._warn(self._no_step.check(steps, read_weights, way_out))

    def _check_nonfinite(self, tally: Tally) -> None:
        """Warn once of a run in which gradients become 0 again and again."""
        if self._settings.nonfinite == "zero" and not self.dry_run:
            self._warn(self._nonfinite.check(tally))

    @property
    def _place(self) -> str:
        """Where it belongs, as a part of a message."""
        place = "put it into the optimizer: clip.as_optimizer(optimizer)"
        if self.clips_update:
            return place
        return f"call pairs = clip(pairs) before optimizer.apply, or {place}"

    def _check_norm(self, norm: float) -> None:
        """Warn once if a clip of another package acts before this one."""
        if not self.is_behind:
            self._warn(self._clipped_before.check(norm))

    def _warn(self, text: str) -> None:
        """Warn of what `metrics` has found, if that is not ""."""
        if text:
            warnings.warn(text, RuntimeWarning, stacklevel=4)

    def _check_steps(self, steps: float) -> None:
        """Compare the steps with the loop; a transformer that has no loop does not."""

    def check_state(self) -> None:
        """Raise if the state is invalid: NaN, a negative level, an impossible count.

        `tf.train.Checkpoint.restore` does not validate what it writes into variables:
        call this once afterwards. `load_weights` and `load_model` validate before they
        write.

        Raises:
          ValueError: the state is invalid, and the message says where and how; or the
            clipper is not built.

        >>> from autoclip_tf import NormClip
        >>> clip = NormClip(1.0)
        >>> clip.build([keras.Variable([0.0, 0.0])])
        >>> clip.check_state()
        """
        check_state(self._read_numpy())

    def reset(self) -> None:
        """Set the policy state, the counts and the last decision to their start.

        Raises:
          ValueError: the clipper is not built.

        >>> from autoclip_tf import NormClip
        >>> weight, clip = keras.Variable([0.0]), NormClip(2.0)
        >>> pairs = clip([(keras.ops.convert_to_tensor([4.0]), weight)])
        >>> clip.reset()
        >>> clip.metrics()["clip/steps"]
        0.0
        """
        self._built_rows()
        self._state.reset()
        self._start_counts()

    def _start_counts(self) -> None:
        """Check the counts of a run that begins."""
        quantity = "updates" if self.clips_update else "gradients"
        self._nonfinite = NonfiniteCheck(quantity)

    def _add_later_variables(self, make: MakeVariable) -> None:
        self._state.add_later_variables(make)
        # `tf.train.Checkpoint` saves the variables under the name of this attribute.
        self._variables = self._state.variables

    def _read_numpy(self) -> ClipperState:
        self._built_rows()
        return self._state.read_numpy()

    def _built_rows(self) -> Rows:
        if self._rows is None:
            raise ValueError(
                "a clipper must be built before its state is read, got one that "
                f"nothing has called; {self._place}; to read it before the first step, "
                "call optimizer.build(model.trainable_variables)"
            )
        return self._rows


class TransformerPair(FixedSettings, _Module):  # type: ignore[misc]
    """Two transformers with states in one place of `gradient_transformers`.

    Args:
      gradient: acts on the gradients, before the step.
      update: acts on the change of the variables, after the step.
    """

    _to_change_settings = CHANGE_SETTINGS

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        """Refuse the model and the optimizer that PyTorch's `TrustClip` takes."""
        if arguments:
            raise TypeError(
                f"{cls.__name__} must have keywords only, got {len(arguments)} other "
                f"arguments; in Keras: {cls.__name__}().as_optimizer(optimizer)"
            )
        made: Self = super().__new__(cls)
        return made

    def __init__(
        self, gradient: StatefulTransformer, update: StatefulTransformer
    ) -> None:
        super().__init__()
        self.gradient = gradient
        self.update = update
        gradient.class_name = update.class_name = type(self).__name__


def split_pairs(transformers: Iterable[Any]) -> Iterator[Any]:
    """Yield the transformers, with the two halves of a pair in place of the pair."""
    for transformer in transformers:
        if isinstance(transformer, TransformerPair):
            yield from (transformer.gradient, transformer.update)
        else:
            yield transformer
