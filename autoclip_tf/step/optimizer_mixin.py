"""`gradient_transformers=` for an optimizer class of Keras 3 or of tf_keras."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NoReturn

import keras
import numpy as np

from autoclip_tf.state.transformer import StatefulTransformer, split_pairs
from autoclip_tf.state.variables import LATER, check_state

from .check_transformers import (
    REPLACEMENTS,
    Pair,
    Transformer,
    check_transformers,
    find_filters,
    find_stateful,
    refuse_clipping_twice,
)


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
    _base_variable_count: int | None = None

    def __init__(
        self,
        *args: Any,
        gradient_transformers: Sequence[Transformer] | None = None,
        **kwargs: Any,
    ) -> None:
        transformers = check_transformers(gradient_transformers)
        super().__init__(*args, **kwargs)
        self._gradient_transformers = transformers
        for clipper in find_filters(transformers)[1:]:
            clipper.is_behind = True
        self._refuse_clipping_twice()

    @property
    def update_clipper(self) -> StatefulTransformer | None:
        """The transformer that clips the change of the variables, or None."""
        transformers = self._stateful_transformers()
        return next((each for each in transformers if each.clips_update), None)

    @property
    def gradient_transformers(self) -> tuple[Transformer, ...]:
        """The callables that each gradient goes through before an update, in order."""
        return self._gradient_transformers

    @gradient_transformers.setter
    def gradient_transformers(self, value: Any) -> NoReturn:
        raise AttributeError(
            "gradient_transformers are set when the optimizer is made, because the "
            "compiled step keeps them; make a new optimizer with others and compile "
            "the model with it"
        )

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
        if self._base_variable_count is not None or not variables:
            return
        super().build(variables)  # type: ignore[misc]
        self._base_variable_count = len(self._variables)  # type: ignore[attr-defined]
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
        saved, count = len(store.keys()), self._base_variable_count
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
        saved, start = len(store.keys()), self._base_variable_count
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
            settings = {name: getattr(self, name, None) for name in REPLACEMENTS}
            way_out = "put {instead} from autoclip_tf into gradient_transformers"
            refuse_clipping_twice(settings, way_out)

    def _stateful_transformers(self) -> list[StatefulTransformer]:
        return find_stateful(self._gradient_transformers)

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
