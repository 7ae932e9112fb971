"""Docstrings as Markdown: doctests in fences, addresses as links, the path of the file.

The docstrings are written for `help()`, where a doctest needs no fence; those of
`autoclip_jax` follow optax, which writes reStructuredText.
"""

import ast
import re
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).+)*", re.MULTILINE)
LINK = re.compile(r"`([^`<]+?)\s+<(https://[^>]+)>`_")
ADDRESS = re.compile(r"(?<![(<\w])https://[^\s,)]+")
PRIVATE = re.compile(r"\b(Observer|Attachment)\b")
TRUST = ast.parse((ROOT / "autoclip_core/clipper/trust.py").read_text("utf-8"))
CONSTANTS = {
    node.targets[0].id: ast.unparse(node.value)
    for node in TRUST.body
    if isinstance(node, ast.Assign)
}
"""The defaults of `TrustClip`."""
ROLE = re.compile(r":class:(`[^`]+`)")


class AsMarkdown(griffe.Extension):
    """Rewrite each docstring before its sections are parsed."""

    def on_object(self, *, obj, **_):
        """Rewrite the docstring of a class, function, module or attribute.

        That of a constructor says what the reader of a class need not know.
        """
        if obj.name == "__init__" and obj.is_function:
            obj.docstring = None
        if obj.is_function:
            hide_private_types(obj)
            show_constants(obj)
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value) + source_of(obj)


def as_markdown(text):
    """Return a docstring with fences around its doctests, and Markdown's links."""
    text = ADDRESS.sub(r"<\g<0>>", ROLE.sub(r"\1", LINK.sub(r"[\1](\2)", text)))
    return DOCTEST.sub(lambda example: f"```pycon\n{example[0]}\n```", text)


def hide_private_types(function):
    """Remove annotations that name a private class; the text describes the value."""
    for parameter in function.parameters:
        if PRIVATE.search(str(parameter.annotation)):
            parameter.annotation = None
    if PRIVATE.search(str(function.returns)):
        function.returns = None


def show_constants(function):
    """Replace the names of constants in a signature by their values."""
    for parameter in function.parameters:
        parameter.default = CONSTANTS.get(str(parameter.default), parameter.default)


def source_of(obj):
    """Return the line that names the file of a class or a function of a module."""
    is_listed = (obj.is_class or obj.is_function) and obj.parent.is_module
    if obj.is_alias or not is_listed:
        return ""
    return f"\n\nSource: `{obj.filepath.relative_to(ROOT)}`, line {obj.lineno}."
