"""What is wrong with the user's data, in one line a person can act on."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used as they are.

    The message is one clear line: which file, what was expected, what was found, what to do about it. The
    command line prints it without a traceback and exits with code 2.
    """
