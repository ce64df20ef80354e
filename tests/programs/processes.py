"""Several processes per command without a launcher: `python tests/programs/processes.py JSON`, one that imports and then forks the others.

JSON is a list of [number of processes, module, arguments for its `main`]; prints a JSON list of [exit codes, standard error, standard output]."""

import importlib
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from distillation import labelling  # noqa: F401  (imported here, once for all)
from run import command
from tests.programs import colours  # noqa: F401  (registers a model)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(module: str, argv: list[str], env: dict[str, str], *, errors, output) -> None:
    """One process's life; does not return."""
    os.environ.update(env)
    os.dup2(errors.fileno(), 2)
    os.dup2(output.fileno(), 1)
    torch.set_num_threads(1)
    try:
        os._exit(importlib.import_module(module).main(argv))
    except Exception as error:
        command.leave(command.explain(error))


def launch(num_processes: int, module: str, argv: list[str]) -> tuple[list[int], str, str]:
    """Exit codes of the processes, and what they wrote to standard error and to standard output."""
    shared = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    importlib.import_module(module)  # once for all
    children = []
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        for rank in range(num_processes):
            child = os.fork()
            if child == 0:
                env = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
                run(module, argv, env, errors=errors, output=output)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        errors.seek(0)
        output.seek(0)
        return codes, errors.read(), output.read()


if __name__ == "__main__":
    print(json.dumps([launch(*arguments) for arguments in json.loads(sys.argv[1])]))
