"""A public docstring documents arguments and errors, and shows an example.

Public are the names in a package's `__init__` and in the modules below, with their
methods. A docstring may leave out what our docstring of the overridden method says,
except errors. A function raises an error if its source has a `raise`, or if it calls a
function of ours that is named after a check or has a `Raises:` section.
"""

import ast
import importlib
import inspect
import re
import textwrap

import pytest

from ..conftest import is_installed
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
    r"(Decision|Limit|Replay|Suggestion|LoggedNorms|\w+State) lacks (Args|an example)":
        "a result, which users do not create; each of its fields has a docstring",
    r"Policy lacks Args": "a protocol: the classes that derive from it have arguments",
    r"\.(on_\w+|ClipCallback\.(setup|teardown)) lacks":
        "a hook, which only the trainer calls; the trainer documents it",
    r"\.ClipCallback\.(state|state_dict|load_state_dict) lacks":
        "the trainer calls it for its checkpoint",
    r"\.(GradientTransformersMixin|KerasMixin)\.\w+ lacks":
        "Keras calls it in a step, or documents it as a method of an optimizer",
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
        for part in missing_parts(thing, owner)
    ]
    unexplained = [
        fault for fault in faults if not any(re.search(e, fault) for e in EXPLAINED)
    ]
    assert not unexplained, "\n".join(unexplained)


def test_missing_parts_are_found():
    def bare(rows):
        """Do it."""
        raise ValueError(rows)

    def cites_a_source():
        """Do it.

        >>> 1

        Reference: https://arxiv.org/abs/2007.14469
        """

    assert list(missing_parts(bare, None)) == ["Args", "Raises", "an example"]
    assert list(missing_parts(cites_a_source, None)) == ["the formula"]


def public(package):
    """Return each public class, function and method by name, with a method's class."""
    parts = {}
    for name in [package, *MODULES[package]]:
        if name in OPTIONAL and not is_installed(OPTIONAL[name]):
            continue
        for attribute, thing in vars(importlib.import_module(name)).items():
            is_defined = name in (package, getattr(thing, "__module__", ""))
            if attribute.startswith("_") or not is_defined or not is_ours(thing):
                continue
            if inspect.isclass(thing):
                parts |= methods(thing)
            if callable(thing):
                parts[f"{thing.__module__}.{attribute}"] = inspect.unwrap(thing), None
    return parts


def methods(kind):
    """Return the public methods of a class and of its base classes in our packages."""
    return {
        f"{base.__module__}.{base.__qualname__}.{name}": (method, kind)
        for base in inspect.getmro(kind)
        if is_ours(base)
        for name, method in inspect.getmembers(base, is_method)
        if name in vars(base) and (name == "__call__" or not name.startswith("_"))
    }


def is_method(member):
    return inspect.isfunction(member) or inspect.ismethod(member)


def missing_parts(thing, owner):
    """Yield the parts that the docstring of a class, a function or a method lacks."""
    text = inspect.cleandoc(thing.__doc__ or "")
    all_text = text + inherited(thing, owner)
    parameters = set(inspect.signature(thing).parameters) - {"self"}
    if parameters and "Args:\n" not in all_text:
        yield "Args"
    if may_raise(thing) and "Raises:\n" not in text:
        yield "Raises"
    if ">>>" not in all_text:
        yield "an example"
    if "https://" in text and " = " not in text.partition("Args:\n")[0]:
        yield "the formula"


def inherited(method, owner):
    """Return the docstrings of a method in our classes that its class derives from."""
    bases = inspect.getmro(owner) if owner else ()
    overridden = (vars(base).get(method.__name__) for base in bases if is_ours(base))
    return "".join(getattr(base, "__doc__", None) or "" for base in overridden)


def may_raise(thing):
    """Return whether a function, or the constructor of a class, raises or checks."""
    if not inspect.isclass(thing):
        return raises(inspect.unwrap(thing))
    constructors = (vars(thing).get(name) for name in ("__init__", "__post_init__"))
    return any(raises(method) for method in constructors if is_written(method))


def raises(function):
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(
        (isinstance(node, ast.Raise) and node.exc is not None)
        or (isinstance(node, ast.Call) and is_checked(node.func, function))
        for node in ast.walk(tree)
    )


def is_checked(called, function):
    """Return, by name or docstring, whether a called function of ours may raise."""
    name = called.id if isinstance(called, ast.Name) else ""
    target = getattr(function, "__globals__", {}).get(name)
    has_section = "Raises:\n" in (getattr(target, "__doc__", None) or "")
    return is_ours(target) and (has_section or bool(CHECK.match(name)))


def is_written(function):
    """Return whether its source is in our files: a dataclass generates methods."""
    code = getattr(function, "__code__", None)
    return is_ours(function) and not code.co_filename.startswith("<")


def is_ours(thing):
    return getattr(thing, "__module__", "").startswith("autoclip_")
