"""A public docstring says what goes in and what is raised, and shows an example.

Public is what a package's `__init__` and the modules below offer, with the methods.
What our docstring of an overridden method says need not be said again, but for what is
raised. Something is raised where the source has a `raise`, or calls a function of ours
that is named after a check or says `Raises:` itself.
"""

import ast
import importlib
import inspect
import re
import textwrap

import pytest

from ..conftest import found
from .test_doctests import OPTIONAL, PACKAGES

MODULES = {
    "autoclip_core": [],
    "autoclip_torch": [
        "autoclip_torch.optim",
        "autoclip_torch.lightning",
        "autoclip_torch.transformers",
    ],
    "autoclip_tf": [
        "autoclip_tf.optimizers",
        "autoclip_tf.callbacks",
        "autoclip_tf.layouts",
        "autoclip_tf.legacy",
    ],
    "autoclip_jax": [],
}

EXPLAINED = {
    r"(Decision|Limit|Replay|Suggestion|ClipState|SkipState) lacks (Args|an example)":
        "a result, which nobody makes; each of its fields has a docstring",
    r"Policy lacks Args": "a protocol: what derives from it has arguments",
    r"\.on_\w+ lacks": "a hook, which the trainer alone calls and documents",
    r"\.ClipCallback\.(state|state_dict|load_state_dict) lacks":
        "the trainer calls it for its checkpoint",
    r"\.(GradientTransformersMixin|_OfKeras)\.\w+ lacks":
        "Keras calls it in a step, or documents it as that of an optimizer",
    r"\.((Quantile|Standard|Z|Norm|Value)Clip|AGC|AdaGC|clip_by_\w+) lacks "
    r"(Args|Raises|the formula)":
        "a named clipper: its policy documents arguments, errors and formula",
}  # fmt: skip

CHECK = re.compile(r"_*(check|refuse)")


@pytest.mark.parametrize(
    "package",
    [pytest.param(p, marks=pytest.mark.needs(f)) for p, f in PACKAGES.items()],
)
def test_public_docstrings_are_whole(package):
    faults = [
        f"{name} lacks {part}"
        for name, (thing, owner) in public(package).items()
        for part in lacking(thing, owner)
    ]
    left = [
        fault for fault in faults if not any(re.search(e, fault) for e in EXPLAINED)
    ]
    assert not left, "\n".join(left)


def test_what_is_lacking_is_found():
    def bare(rows):
        """Do it."""
        raise ValueError(rows)

    def sourced():
        """Do it.

        >>> 1

        Reference: https://arxiv.org/abs/2007.14469
        """

    assert list(lacking(bare, None)) == ["Args", "Raises", "an example"]
    assert list(lacking(sourced, None)) == ["the formula"]


def public(package):
    """Return each public class, function and method by name, with a method's class."""
    parts = {}
    for name in [package, *MODULES[package]]:
        if name in OPTIONAL and not found(OPTIONAL[name]):
            continue
        for own, thing in vars(importlib.import_module(name)).items():
            here = name in (package, getattr(thing, "__module__", ""))
            if own.startswith("_") or not here or not is_ours(thing):
                continue
            if inspect.isclass(thing):
                parts |= methods(thing)
            if callable(thing):
                parts[f"{thing.__module__}.{own}"] = inspect.unwrap(thing), None
    return parts


def methods(kind):
    """Return the public methods of a class and of our classes that it derives from."""
    return {
        f"{base.__module__}.{base.__qualname__}.{name}": (method, kind)
        for base in inspect.getmro(kind)
        if is_ours(base)
        for name, method in inspect.getmembers(base, is_method)
        if name in vars(base) and (name == "__call__" or not name.startswith("_"))
    }


def is_method(member):
    return inspect.isfunction(member) or inspect.ismethod(member)


def lacking(thing, owner):
    """Yield what the docstring of a class, a function or a method lacks."""
    own = inspect.cleandoc(thing.__doc__ or "")
    said = own + inherited(thing, owner)
    parameters = set(inspect.signature(thing).parameters) - {"self"}
    if parameters and "Args:\n" not in said:
        yield "Args"
    if may_raise(thing) and "Raises:\n" not in own:
        yield "Raises"
    if ">>>" not in said:
        yield "an example"
    if "https://" in own and " = " not in own.partition("Args:\n")[0]:
        yield "the formula"


def inherited(method, owner):
    """Return what the classes of ours that a class derives from say of its method."""
    bases = inspect.getmro(owner) if owner else ()
    overridden = (vars(base).get(method.__name__) for base in bases if is_ours(base))
    return "".join(getattr(one, "__doc__", None) or "" for one in overridden)


def may_raise(thing):
    """Tell whether a function, or the constructor of a class, raises or checks."""
    if not inspect.isclass(thing):
        return raises(inspect.unwrap(thing))
    constructors = (vars(thing).get(name) for name in ("__init__", "__post_init__"))
    return any(raises(one) for one in constructors if is_written(one))


def raises(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(
        (isinstance(node, ast.Raise) and node.exc is not None)
        or (isinstance(node, ast.Call) and is_checked(node.func, function))
        for node in ast.walk(tree)
    )


def is_checked(called, function):
    """Tell whether what a function calls is ours and raises, as its name or it says."""
    name = called.id if isinstance(called, ast.Name) else ""
    known = getattr(function, "__globals__", {}).get(name)
    says = "Raises:\n" in (getattr(known, "__doc__", None) or "")
    return is_ours(known) and (says or bool(CHECK.match(name)))


def is_written(function):
    """Tell whether one of us wrote it: what a dataclass makes lies in no file."""
    code = getattr(function, "__code__", None)
    return is_ours(function) and not code.co_filename.startswith("<")


def is_ours(thing):
    return getattr(thing, "__module__", "").startswith("autoclip_")
