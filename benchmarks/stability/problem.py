"""The one kind of error that ends the program with a line instead of a traceback."""

from __future__ import annotations


class Problem(Exception):
    """Something that the user can put right; the message says how."""
