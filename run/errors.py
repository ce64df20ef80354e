"""The exceptions for what a user can put right: bad flags, files, data or checkpoints; a full disk."""


class InputError(ValueError):
    """What happened and where (`fact`), and what to do; `main.py` prints its text alone, without a traceback, and exits with 1."""

    def __init__(self, fact: str, cure: str = ""):
        super().__init__(f"{fact}: {cure}" if cure else fact)
        self.fact = fact

    def __str__(self) -> str:
        return super().__str__().rpartition("errors.InputError: ")[2].strip()  # a loader's worker wraps it in its own traceback


class DiskFull(InputError):
    """Something could not be written for want of room; nothing of it is left, and it may be tried again."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
