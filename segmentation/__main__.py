"""Train or evaluate a segmenter; `python -m segmentation --help` lists the settings."""

import functools
import importlib
import sys

from features import running
from run.command import run_process
from segmentation import config

main = functools.partial(running.main, parse=config.parse, open_task=functools.partial(importlib.import_module, "segmentation.training"))

if __name__ == "__main__":
    run_process(main, sys.argv[1:])
