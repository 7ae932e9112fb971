"""Docstrings as Markdown: their doctests in fences, and their addresses as links.

The docstrings are written for `help()`, where a doctest needs no fence; those of
`autoclip_jax` follow optax, which writes reStructuredText.
"""

import re

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\s*$).+)*", re.MULTILINE)
LINK = re.compile(r"`([^`<]+?)\s+<(https://[^>]+)>`_")
ADDRESS = re.compile(r"(?<![(<\w])https://[^\s,)]+")
ROLE = re.compile(r":class:(`[^`]+`)")


class AsMarkdown(griffe.Extension):
    """Rewrite each docstring before its sections are parsed."""

    def on_object(self, *, obj, **_):
        """Rewrite the docstring of a class, function, module or attribute.

        That of a constructor says what the reader of a class need not know.
        """
        if obj.name == "__init__" and obj.is_function:
            obj.docstring = None
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text):
    """Return a docstring with fences around its doctests, and Markdown's links."""
    text = ADDRESS.sub(r"<\g<0>>", ROLE.sub(r"\1", LINK.sub(r"[\1](\2)", text)))
    return DOCTEST.sub(lambda example: f"```pycon\n{example[0]}\n```", text)
