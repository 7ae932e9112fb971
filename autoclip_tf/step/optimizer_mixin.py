"""`gradient_transformers=` for an optimizer class of Keras 3 or of tf_keras."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn

import keras
import numpy as np

from autoclip_core.checks import format_error
from autoclip_tf.state.transformer import (
    StatefulTransformer,
    TransformerPair,
    split_pairs,
)
from autoclip_tf.state.variables import LATER, check_state

Pair = tuple[Any, Any]
"""A gradient, or None, and its variable."""

Transformer = Callable[[list[Pair]], Iterable[Pair]]
"""From a list of (gradient, variable) pairs to such a list."""

_REPLACEMENTS = {
    "clipnorm": 'NormClip(..., scope="parameter")',
    "global_clipnorm": "NormClip(...)",
    "clipvalue": "ValueClip(...)",
}
"""What stands in for each argument of Keras that clips."""


class GradientTransformersMixin:
    """Adds `gradient_transformers=` to the optimizer class that follows in the bases.

    A subclass calls `transform` on the gradients that an update uses, and the
    `clip_update` of the update clipper, if there is one, after the step. Its
    `add_state_variable` makes a variable of the optimizer.

    Args:
      *args: the arguments of the optimizer.
      gradient_transformers: callables that each gradient goes through, in order.
      **kwargs: the keywords of the optimizer.

    Raises:
      TypeError: a transformer is not callable.
      ValueError: the optimizer also clips by itself, a transformer is repeated, or two
        clip the update.
    """

    # The number of variables without the clippers' variables; None before `build`.
    _own_variable_count: int | None = None

    def __init__(
        self,
        *args: Any,
        gradient_transformers: Sequence[Transformer] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the transformers and make the optimizer."""
        transformers = _check_transformers(gradient_transformers)
        super().__init__(*args, **kwargs)
        self._gradient_transformers = transformers
        self._refuse_clipping_twice()

    @property
    def update_clipper(self) -> StatefulTransformer | None:
        """The transformer that clips the change of the variables, or None."""
        for transformer in self._stateful_transformers():
            if transformer.clips_update:
                return transformer
        return None

    @property
    def gradient_transformers(self) -> tuple[Transformer, ...]:
        """The callables that each gradient goes through before an update, in order."""
        return self._gradient_transformers

    def add_state_variable(self, name: str, value: np.ndarray[Any, Any]) -> Any:
        """Return a new variable of this optimizer, for the state of a clipper."""
        raise NotImplementedError

    def build(self, variables: Sequence[Any]) -> None:
        """Make the variables of the optimizer, then the variables of the clippers.

        In this order, a checkpoint of the same optimizer without clippers is the
        beginning of a checkpoint with them. The variables that earlier versions lack
        come last, after those of all clippers.

        Without variables, the optimizer is left unbuilt. Keras calls this so to load an
        `.h5` file, or a model whose layers are all frozen. The first step then builds.
        """
        if self._own_variable_count is not None or not variables:
            return
        super().build(variables)  # type: ignore[misc]
        self._own_variable_count = len(self._variables)  # type: ignore[attr-defined]
        for transformer in self._stateful_transformers():
            transformer._build_without_later(list(variables), self.add_state_variable)
        for transformer in self._stateful_transformers():
            transformer._add_later_variables(self.add_state_variable)

    def transform(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the transformed pairs that have a gradient.

        Raises:
          ValueError: `clipnorm` or a similar attribute was set later.
        """
        self._refuse_clipping_twice()
        pairs, update_clipper = list(pairs), self.update_clipper
        for transformer in split_pairs(self._gradient_transformers):
            if transformer is not update_clipper:
                pairs = list(transformer(pairs))
        return [pair for pair in pairs if pair[0] is not None]

    def load_own_variables(self, store: Any) -> None:
        """Restore the optimizer; a file without clippers leaves their state unchanged.

        Raises:
          ValueError: a variable has another shape in the file, or the state of a
            clipper is invalid; no variable was changed.
        """
        store = self._complete(store)
        saved, count = len(store.keys()), self._own_variable_count
        variables = self._variables[:saved]  # type: ignore[attr-defined]
        if len(variables) == saved:
            _check_shapes(variables, store)
            self._check_states(store)
        if count is None or saved != count:
            super().load_own_variables(store)  # type: ignore[misc]
            return
        for index, variable in enumerate(variables):
            variable.assign(store[str(index)])

    def _complete(self, store: Any) -> Any:
        """Return a file of an earlier version with zeros for the variables it lacks."""
        later_count = len(LATER) * len(self._stateful_transformers())
        saved = len(store.keys())
        later = self._variables[saved:]  # type: ignore[attr-defined]
        if not later_count or len(later) != later_count:
            return store
        values = [store[str(index)] for index in range(saved)]
        values += [
            np.zeros(v.shape, keras.backend.standardize_dtype(v.dtype)) for v in later
        ]
        return {str(index): value for index, value in enumerate(values)}

    def _check_states(self, store: Any) -> None:
        """Refuse a file that has all variables but an invalid state of a clipper."""
        saved, start = len(store.keys()), self._own_variable_count
        if start is None or saved != len(self._variables):  # type: ignore[attr-defined]
            return
        states = [transformer._state for transformer in self._stateful_transformers()]
        end = saved - len(LATER) * len(states)
        first = (np.asarray(store[str(index)]) for index in range(start, end))
        later = (np.asarray(store[str(index)]) for index in range(end, saved))
        for state in states:
            count = len(state.variables) - len(LATER)
            values = [*islice(first, count), *islice(later, len(LATER))]
            check_state(state.from_values(values))

    def _refuse_clipping_twice(self) -> None:
        if self._gradient_transformers:
            settings = {name: getattr(self, name, None) for name in _REPLACEMENTS}
            way_out = "put {instead} from autoclip_tf into gradient_transformers"
            refuse_clipping_twice(settings, way_out)

    def _stateful_transformers(self) -> list[StatefulTransformer]:
        return _find_stateful(self._gradient_transformers)

    def get_config(self) -> dict[str, Any]:
        """Return the configuration of the optimizer and of its transformers."""
        serialize = keras.saving.serialize_keras_object
        transformers = [serialize(each) for each in self._gradient_transformers]
        config = super().get_config()  # type: ignore[misc]
        return {**config, "gradient_transformers": transformers}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """Return the optimizer that `get_config` described."""
        deserialize = keras.saving.deserialize_keras_object
        arguments = dict(config)
        arguments["gradient_transformers"] = [
            each if callable(each) else deserialize(each, custom_objects=custom_objects)
            for each in config.get("gradient_transformers") or ()
        ]
        if arguments["gradient_transformers"]:
            refuse_clipping_twice(arguments, 'write config["{name}"] = None')
        return super().from_config(arguments, custom_objects)  # type: ignore[misc]


def refuse_pairs(owner: type) -> NoReturn:
    """Raise a TypeError: a clipper of updates was called with gradients.

    Raises:
      TypeError: always.
    """
    raise TypeError(
        f"{owner.__name__} must clip inside an optimizer of Keras 3, got gradients; "
        "the update is not known before the step; write "
        f"{owner.__name__}(...).as_optimizer(keras.optimizers.SGD(0.1))"
    )


def _find_stateful(transformers: Iterable[Any]) -> list[StatefulTransformer]:
    halves = split_pairs(transformers)
    return [each for each in halves if isinstance(each, StatefulTransformer)]


def _check_shapes(variables: Sequence[Any], store: Any) -> None:
    """Refuse the file of an optimizer with other clippers before anything is loaded."""
    for index, variable in enumerate(variables):
        saved, expected = tuple(store[str(index)].shape), tuple(variable.shape)
        if saved != expected:
            raise ValueError(
                f"the file does not fit this optimizer: {variable.name} has shape "
                f"{saved} in the file and {expected} in the optimizer; make the "
                "clippers with the arguments that they had when the file was saved "
                "(no variable of the optimizer was changed)"
            )


def _check_transformers(transformers: Any) -> tuple[Transformer, ...]:
    """Return the transformers as a tuple.

    Raises:
      TypeError: the transformers are not a list of callables.
      ValueError: a transformer is repeated, two clip the update, or another clips the
        gradients of a `TrustClip`.
    """
    name, rule = "gradient_transformers", "a list of callables"
    if transformers is None:
        return ()
    if callable(transformers):
        raise TypeError(format_error(name, rule, transformers, "write [...] around it"))
    for transformer in transformers:
        if isinstance(transformer, type) or not callable(transformer):
            way_out = "write a clipper, such as QuantileClip(quantile=0.9)"
            raise TypeError(format_error(name, rule, transformer, way_out))
    if len(set(map(id, transformers))) < len(transformers):
        way_out = "a clipper holds one history; make a second one"
        error = format_error(name, "without repetition", transformers, way_out)
        raise ValueError(error)
    stateful = _find_stateful(transformers)
    if sum(transformer.clips_update for transformer in stateful) > 1:
        rule, way_out = "with at most one that clips the update", "leave one out"
        raise ValueError(format_error(name, rule, transformers, way_out))
    _refuse_second_filter(transformers)
    return tuple(transformers)


def _refuse_second_filter(transformers: Sequence[Any]) -> None:
    """Refuse to clip gradients that a `TrustClip` clips already.

    A clipper in a dry run may be in the list, too.

    Raises:
      ValueError: another transformer clips the gradients.
    """
    others = [each for each in transformers if not isinstance(each, TransformerPair)]
    filters = [
        each for each in _find_stateful(others) if not each.clips_update | each.dry_run
    ]
    if filters and len(others) < len(transformers):
        rule = "without another clipper of gradients if it holds a TrustClip"
        way_out = (
            "the gradients would be clipped twice; leave it out, or keep it and bound "
            "the update alone: UpdateClipper(ParamRatio(0.01, eps=0.2), norm='rms')"
        )
        name = "gradient_transformers"
        raise ValueError(format_error(name, rule, filters[0], way_out))


def refuse_clipping_twice(settings: Mapping[str, Any], way_out: str) -> None:
    """Refuse Keras's clipping together with transformers, as legacy optimizers do.

    Args:
      settings: the arguments of the optimizer.
      way_out: the end of the error, with the fields `name` and `instead`.

    Raises:
      ValueError: an argument clips.
    """
    for name, instead in _REPLACEMENTS.items():
        value = settings.get(name)
        if value is not None:
            rule = "left out if another clipper acts"
            way_out = way_out.format(name=name, instead=instead)
            raise ValueError(format_error(name, rule, value, way_out))
