"""The errors that a user is expected to act on."""

from __future__ import annotations


class InputError(Exception):
    """Something given to the tool cannot be used: the command line exits with code 2.

    The message is one line that says what is wrong, where, what was expected and, where it helps,
    what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InadmissibleError(Exception):
    """Two quantities were asked to be compared that are not over the same population.

    Raised by the types that hold statistics, so that an inadmissible ratio cannot be formed by
    accident.
    """
