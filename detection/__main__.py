"""Train or evaluate a detector; `python -m detection --help` lists the settings."""

import functools
import importlib
import sys

from detection import config
from features import running
from run.command import run_process

main = functools.partial(running.main, parse=config.parse, open_task=functools.partial(importlib.import_module, "detection.training"))

if __name__ == "__main__":
    run_process(main, sys.argv[1:])
