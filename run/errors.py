"""The exceptions for what a user can put right: bad flags, files, data or checkpoints; a full disk."""

import re


class InputError(ValueError):
    """What happened and where (`fact`), and what to do; `main.py` prints its text alone, without a traceback, and exits with 1."""

    def __init__(self, fact: str, cure: str = ""):
        super().__init__(f"{fact}: {cure}" if cure else fact)
        self.fact = fact

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


class DiskFull(InputError):
    """Something could not be written for want of room; nothing of it is left, and it may be tried again."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
