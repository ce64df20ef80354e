"""The exception for what a user can put right: bad flags, files, data or checkpoints."""


class InputError(ValueError):
    """What happened, where, and what to do; `main.py` prints its text alone, without a traceback, and exits with 1."""

    def __str__(self) -> str:
        return super().__str__().rpartition("errors.InputError: ")[2].strip()  # a loader's worker wraps it in its own traceback


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
