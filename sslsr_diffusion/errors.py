"""The errors that are meant for the person in front of the screen."""


class UserError(ValueError):
    """A mistake the user can mend: the message says what was expected, what it got and what to do.

    The command line prints it as one line and exits with 2; it never shows a traceback for it. Control characters and
    bytes that are not UTF-8 (of file names, of recipes) come out as \\x.., never as themselves.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(_visible(line) for line in message.split("\n")))


def _visible(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Refused(UserError):
    """What was named is there and whole, and cannot be used here: another one has to be chosen."""


class MissingDependency(ImportError):
    """An optional package is needed for what was asked; the message carries the `pip install` line that mends it."""


class NotEnoughMemory(UserError):
    """What was asked for does not fit into memory, or into the budget, however small the pieces are."""

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least  # bytes that would do
