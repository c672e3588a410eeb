"""What is wrong with the user's data, in one line a person can act on."""

from __future__ import annotations

_LONGEST = 1000  # signs of a line


class DataError(ValueError):
    """The data cannot be used as they are.

    The message is one clear line: which file, what was expected, what was found, what to do about it. The
    command line prints it without a traceback and exits with code 2.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text with all that is not printable escaped, and the middle of a long one left out.

    A file's name and its content may hold ends of lines, and what a terminal takes for a command.
    """
    text = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2 - 2]} … {text[1 - _LONGEST // 2 :]}"
