"""The errors that are meant for the person in front of the screen."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake the user can mend: the message says what was expected, what came and what to do.

    The command line prints it as one line and exits with 2; it never shows a traceback for it.
    """


class MissingDependency(ImportError):
    """An optional package is needed for what was asked; the message carries the `pip install` line that mends it."""
