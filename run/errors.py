"""The exceptions for what a user can put right: bad flags, files, data or checkpoints; a full disk."""

import contextlib
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


SEPARATOR = "\nerror: "  # so that each of several faults is a line of its own


class Faults:
    """Faults found one after the other, to be told together."""

    def __init__(self):
        self.texts: list[str] = []

    @contextlib.contextmanager
    def looking(self):
        """For a block that looks at one thing: its InputError is kept, and what comes after the block is looked at nevertheless."""
        try:
            yield
        except InputError as error:
            self.add(*str(error).split(SEPARATOR))

    def add(self, *texts: str) -> None:
        """Keep these faults, each of them once."""
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]

    def refuse(self) -> None:
        """InputError with all of them; nothing where there are none."""
        if self.texts:
            raise InputError(SEPARATOR.join(self.texts))


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
