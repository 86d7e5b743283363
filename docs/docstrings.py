"""Docstrings as mkdocstrings reads them: its word for examples is plural, and it has no roles of Sphinx."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every object that has been read."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r":(?:func|class|meth|mod):`([^`]+)`", r"`\1`", text)
