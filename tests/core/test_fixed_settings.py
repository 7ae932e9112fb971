"""A setting cannot be assigned to a clipper that exists; other names can."""

import itertools
from dataclasses import dataclass
from typing import TypedDict, Unpack

import pytest

from autoclip_core import Cap, Quantile
from autoclip_core.clipper.fixed_settings import FixedSettings


class Keywords(TypedDict, total=False):
    """The keywords of `Clip`."""

    scope: str


class Clip(FixedSettings):
    """A clipper of this package, for its module's name."""

    __module__ = "autoclip_test"
    _to_change_settings = "make another"

    def __init__(self, rule: int, **keywords: Unpack[Keywords]) -> None:
        self.policy = Cap(Quantile(0.5), max_norm=1.0)
        self.rule, self.keywords = rule, keywords
        self._dry_run = False

    @property
    def dry_run(self) -> bool:
        """Whether nothing is changed."""
        return self._dry_run

    @dry_run.setter
    def dry_run(self, value: bool) -> None:
        self._dry_run = value


class OwnClip(Clip):
    """The clipper of a user, with attributes and arguments of its own."""

    def __init__(self, history_length: float, extra: int = 0) -> None:
        super().__init__(1, scope="unit")
        self.history_length, self.rule, self.extra = history_length, 3, extra


class Unchanged(OwnClip):
    """A subclass without a constructor."""


@dataclass
class DataClip(Clip):
    """A subclass whose constructor is made later; its objects are never refused."""

    size: int

    def __post_init__(self) -> None:
        super().__init__(self.size)


SETTINGS = ["policy", "quantile", "max_norm", "include_current", "rule", "scope"]
MAKERS = [Clip, OwnClip, Unchanged]


@pytest.mark.parametrize(
    ("make", "name"), [*itertools.product(MAKERS, SETTINGS), (Clip, "history_length")]
)
def test_a_setting_cannot_be_assigned(make, name):
    """The arguments of the constructor, its keywords, and those of the policies."""
    clip = make(2)
    before = dict(vars(clip))
    with pytest.raises(AttributeError, match=rf"^{name} is set when the .*another; "):
        setattr(clip, name, 1)
    assert vars(clip) == before


@pytest.mark.parametrize("name", ["dry_run", "extra", "keywords", "_rule", "logger"])
@pytest.mark.parametrize("make", [Clip, OwnClip, Unchanged])
def test_other_names_can_be_assigned(make, name):
    """A property with a setter, private names, and what a user adds."""
    clip = make(2)
    setattr(clip, name, 1)
    assert getattr(clip, name) == 1


def test_the_constructor_of_a_subclass_may_assign_every_name():
    clip = OwnClip(5, extra=4)
    assert (clip.history_length, clip.rule, clip.extra) == (5, 3, 4)


@pytest.mark.parametrize("make", [OwnClip, Unchanged])
def test_what_a_subclass_calls_like_an_argument_of_the_policy_can_be_assigned(make):
    clip = make(5)
    clip.history_length += 1
    assert clip.history_length == 6


def test_a_dataclass_may_be_a_clipper():
    """Its constructor assigns its fields."""
    assert DataClip(3).rule == 3
