"""What is wrong with the user's data, in one line a person can act on."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used as they are.

    The message is one clear line: which file, what was expected, what was found, what to do about it. The
    command line prints it without a traceback and exits with code 2.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with its line ends escaped: a file's name may hold them."""
    return text.replace("\n", "\\n").replace("\r", "\\r")
