"""The exception for what a user can put right: bad flags, files, data or checkpoints."""

import re


class InputError(ValueError):
    """What happened, where, and what to do; `main.py` prints its text alone, without a traceback, and exits with 1."""

    def __str__(self) -> str:
        return re.split(r"errors\.[A-Z]\w+: ", super().__str__())[-1].strip()  # a loader's worker wraps it in its own traceback


class DamagedImage(InputError):
    """An image that cannot be read or decoded: its `name`, and the `reason`.

    A loader's worker hands it on as one text, its traceback, and without the two."""

    def __init__(self, name: str, reason: str | None = None):
        super().__init__(name if reason is None else f"{name} cannot be read as an image ({reason}): replace or remove it")
        self.name, self.reason = name, reason


class DamagedImages(InputError):
    """Damaged images that all processes of a run know of, and stop for at the same place."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
