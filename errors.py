"""The one exception for what a user can put right: bad flags, files, data or checkpoints."""


class InputError(ValueError):
    """What happened, where, and what to do; `main.py` prints its text alone, without a traceback, and exits with 1."""
