"""What `gradient_transformers=` adds to an optimizer of Keras 3 or of tf_keras."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from autoclip_core.checks import format_error

from .clipper import Clipper, Pair
from .memory import check_memory

Transformer = Callable[[list[Pair]], Iterable[Pair]]
"""From a list of (gradient, variable) pairs to such a list."""


class GradientTransformersMixin:
    """Adds `gradient_transformers=` to the optimizer that follows in the bases.

    A subclass calls `transformed` on the gradients that an update will use, and says
    in `add_memory` how the optimizer makes a variable of its own.

    Args:
      *args: what the optimizer takes.
      gradient_transformers: callables that each gradient goes through, in order.
      **kwargs: what the optimizer takes.

    Raises:
      TypeError: one is not callable.
      ValueError: the optimizer is to clip by itself, too.
    """

    def __init__(
        self,
        *args: Any,
        gradient_transformers: Sequence[Transformer] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the transformers and make the optimizer."""
        transformers = _checked(gradient_transformers)
        super().__init__(*args, **kwargs)
        self._gradient_transformers = transformers
        if transformers:
            _refuse_clipping_twice(self)

    @property
    def gradient_transformers(self) -> tuple[Transformer, ...]:
        """What each gradient goes through before an update, in order."""
        return self._gradient_transformers

    def add_memory(self, name: str, value: np.ndarray[Any, Any]) -> Any:
        """Return a new variable of this optimizer, for a clipper's memory."""
        raise NotImplementedError

    def build(self, variables: Sequence[Any]) -> None:
        """Make the variables of the optimizer, and after them those of the clippers.

        In this order a checkpoint of the same optimizer without clippers is the
        beginning of one with them.
        """
        if getattr(self, "_plain_count", None) is not None:
            return
        super().build(variables)  # type: ignore[misc]
        self._plain_count = len(self._variables)  # type: ignore[attr-defined]
        for transformer in self._gradient_transformers:
            if isinstance(transformer, Clipper):
                transformer.build(list(variables), self.add_memory)

    def transformed(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the pairs after all transformers, without those that lost theirs."""
        pairs = list(pairs)
        for transformer in self._gradient_transformers:
            pairs = list(transformer(pairs))
        return [pair for pair in pairs if pair[0] is not None]

    def load_own_variables(self, store: Any) -> None:
        """Restore the optimizer; from a file without clippers, all but their memory.

        Raises:
          ValueError: a variable has another shape there, or a clipper's memory is
            broken; none was changed.
        """
        saved, count = len(store.keys()), getattr(self, "_plain_count", None)
        own = self._variables[:saved]  # type: ignore[attr-defined]
        if len(own) == saved:
            _check_shapes(own, store)
            self._check_memories(store)
        if count is None or saved != count:
            super().load_own_variables(store)  # type: ignore[misc]
            return
        for index, variable in enumerate(own):
            variable.assign(store[str(index)])

    def _check_memories(self, store: Any) -> None:
        """Refuse a file in which a clipper's memory is broken, if it has them all."""
        saved, count = len(store.keys()), getattr(self, "_plain_count", None)
        if count is None or saved != len(self._variables):  # type: ignore[attr-defined]
            return
        values = (np.asarray(store[str(index)]) for index in range(count, saved))
        for transformer in self._gradient_transformers:
            if isinstance(transformer, Clipper):
                check_memory(transformer._store.holding(values))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration of the optimizer and of its transformers."""
        save = keras.saving.serialize_keras_object
        saved = [save(transformer) for transformer in self._gradient_transformers]
        config = super().get_config()  # type: ignore[misc]
        return {**config, "gradient_transformers": saved}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """Return the optimizer that `get_config` described."""
        load = keras.saving.deserialize_keras_object
        given = dict(config)
        given["gradient_transformers"] = [
            one if callable(one) else load(one, custom_objects=custom_objects)
            for one in given.get("gradient_transformers") or ()
        ]
        return super().from_config(given, custom_objects)  # type: ignore[misc]


def _check_shapes(variables: Sequence[Any], store: Any) -> None:
    """Refuse a file of other clippers before anything is loaded."""
    for index, variable in enumerate(variables):
        theirs, ours = tuple(store[str(index)].shape), tuple(variable.shape)
        if theirs != ours:
            raise ValueError(
                f"the file does not fit this optimizer: {variable.name} has shape "
                f"{theirs} there and {ours} here; make the clippers as they were when "
                "it was saved (nothing of the optimizer was changed)"
            )


def _checked(transformers: Any) -> tuple[Transformer, ...]:
    """Return the transformers as a tuple, refusing what is none."""
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
        raise ValueError(
            format_error(name, "without repetition", transformers, way_out)
        )
    return tuple(transformers)


def _refuse_clipping_twice(optimizer: Any) -> None:
    """Refuse Keras's own clipping beside ours, as the legacy optimizers do."""
    ways_out = {
        "clipnorm": 'NormClip(..., scope="parameter")',
        "global_clipnorm": "NormClip(...)",
        "clipvalue": "ValueClip(...)",
    }
    for name, way_out in ways_out.items():
        value = getattr(optimizer, name, None)
        if value is not None:
            rule = "left out where there are gradient_transformers"
            hint = f"put {way_out} from autoclip_tf among them instead"
            raise ValueError(format_error(name, rule, value, hint))
