"""What `gradient_transformers=` accepts: each step is clipped once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from autoclip_core.checks import format_error
from autoclip_tf.state.transformer import (
    StatefulTransformer,
    TransformerPair,
    split_pairs,
)

Pair = tuple[Any, Any]
"""A gradient, or None, and its variable."""

Transformer = Callable[[list[Pair]], Iterable[Pair]]
"""From a list of (gradient, variable) pairs to such a list."""

REPLACEMENTS = {
    "clipnorm": 'NormClip(..., scope="parameter")',
    "global_clipnorm": "NormClip(...)",
    "clipvalue": "ValueClip(...)",
}
"""What stands in for each argument of Keras that clips."""


def check_transformers(transformers: Any) -> tuple[Transformer, ...]:
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
    stateful = find_stateful(transformers)
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
    filters = find_filters(others)
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
    for name, instead in REPLACEMENTS.items():
        value = settings.get(name)
        if value is not None:
            rule = "left out if another clipper acts"
            way_out = way_out.format(name=name, instead=instead)
            raise ValueError(format_error(name, rule, value, way_out))


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


class ActsInOptimizer:
    """A clipper of updates, which an optimizer calls in its step."""

    def __call__(self, grads_and_vars: Iterable[Pair]) -> NoReturn:
        """Raise a TypeError: the update is not known before the step.

        Args:
          grads_and_vars: pairs of a gradient and its variable, as for `Clipper`.

        Raises:
          TypeError: always.

        >>> from autoclip_tf import TrustClip
        >>> try:
        ...     TrustClip()([])
        ... except TypeError as error:
        ...     print(str(error).split(",")[0])
        TrustClip must clip inside an optimizer of Keras 3
        """
        refuse_pairs(type(self))


def find_stateful(transformers: Iterable[Any]) -> list[StatefulTransformer]:
    """Return the transformers that have a state, halves of a pair too."""
    halves = split_pairs(transformers)
    return [each for each in halves if isinstance(each, StatefulTransformer)]


def find_filters(transformers: Iterable[Any]) -> list[StatefulTransformer]:
    """Return the clippers that change gradients: no bounds of updates, no dry runs."""
    stateful = find_stateful(transformers)
    return [each for each in stateful if not each.clips_update | each.dry_run]
