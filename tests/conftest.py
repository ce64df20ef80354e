"""Small real data and a short run, shared by the tests: scikit-learn's digits as JPEG folders."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import main
from sources.sets import load_digits
from tests.programs.forked import Forked
from tools.export_digits import export

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has what it starts in the background ignore
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup does


@pytest.fixture(autouse=True)
def _few_threads_and_own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


LOADERS: weakref.WeakSet[DataLoader] = weakref.WeakSet()
start_iterator = DataLoader._get_iterator
DataLoader._get_iterator = lambda loader: (LOADERS.add(loader), start_iterator(loader))[1]


@pytest.fixture(autouse=True)
def _loader_processes_end():
    """With the test: those of an error that is still held would be collected later, in a reference cycle, where torch waits 5 seconds for each."""
    yield
    for loader in list(LOADERS):
        if loader._iterator is not None and loader.persistent_workers:
            iterator, loader._iterator = loader._iterator, None
            iterator._shutdown_workers()


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """96 training and 40 validation JPEGs of 48x48 in four class folders, as ImageNet's are laid out."""
    folder = tmp_path_factory.mktemp("digits")
    for name, images, count in zip(("train", "val"), load_digits(), (96, 40), strict=True):
        few = [i for i, target in enumerate(images.targets) if target < 4][:count]
        export(images.part(few), folder / name, size=48)
    return folder


@pytest.fixture(scope="session")
def layouts(digits_folder, tmp_path_factory):
    """The small folder in another layout (see `benchmarks.layouts`), by the layout's name: its folder, not to be changed."""
    from benchmarks import layouts as writers

    root, made = tmp_path_factory.mktemp("layouts"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = writers.write(kind, digits_folder, root / kind)
        return made[kind]

    return get


FEW_STEPS = [
    "--input-size=32", "--batch-size=16", "--mix-group-size=16", "--mix-lanes=2", "--epochs=2", "--warmup-epochs=1", "--lr=3e-2",
    "--model-ema-decay=0.9", "--num_workers=0", "--hflip=0", "--device=cpu",
]  # fmt: skip
SMALL_NET = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 128)}  # of RecNeXt-M
SHORT_RUN = ["--model=recnext_m0", "--model-kwargs", *(f"{name}={list(values)}".replace(" ", "") for name, values in SMALL_NET.items()), *FEW_STEPS]


def short_run_with(*flags: str) -> list[str]:
    """The flags of a short run with these, which may name another network."""
    return [*(FEW_STEPS if any(flag.startswith("--model=") for flag in flags) else SHORT_RUN), *flags]


# A network whose checkpoints are small, for tests of files. In channels-last its backward pass crashes in oneDNN (torch 2.14).
TINY = ["--model=resnet18", "--model-kwargs", "channels=[4,8,8,8]", "layers=[1,1,1,1]", "--memory-format=nchw"]
TINY_RUN = [*FEW_STEPS, *TINY, "--distillation-type=none"]


@pytest.fixture
def short_run(digits_folder, capsys):
    """Run main in this process on the small folder; returns what it printed. Flags given override those of the short run, a model its network."""

    def run(*flags: str) -> str:
        data = [] if any("--data" in flag for flag in flags) else [f"--data-path={digits_folder}"]
        distillation = [] if any("--distill" in flag or "--finetune" in flag for flag in flags) else ["--distillation-type=none"]
        main.main(short_run_with(*data, *distillation, *flags))
        return capsys.readouterr().out

    return run


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


STARTED: list[subprocess.Popen | Forked] = []


@pytest.fixture(autouse=True)
def _nothing_left_running():
    """What is left of a test's commands ends with it."""
    yield
    while STARTED:
        process = STARTED.pop()
        with contextlib.suppress(ProcessLookupError):  # all are gone
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


def environment(**env: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **env}


def start(*args: str, has_own_stderr: bool = False, output: Path | None = None, **env: str) -> Forked:
    """A command of the project, from the root, in a process of its own that has imported it already."""
    STARTED.append(Forked(args, environment(**env), has_own_stderr=has_own_stderr, output=output))
    return STARTED[-1]


def finish(process: Forked, expected_code: int) -> str:
    """What it said until it ended."""
    out, _ = process.communicate()
    assert process.returncode == expected_code, out
    return out


def wait_for(path: Path, process: Forked) -> None:
    """Until `path` exists; a run that ends before has failed."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def run_command(*args: str, **env: str) -> subprocess.CompletedProcess:
    """A command of the project as a user runs it, to its end."""
    settings = {"cwd": ROOT, "env": environment(**env), "start_new_session": True}
    process = subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)
    STARTED.append(process)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_forked(*args: str, **env: str) -> subprocess.CompletedProcess:
    """The same in a process that has imported the project already."""
    process = start(*args, has_own_stderr=True, **env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def run_processes(*runs: tuple[int, str, list[str]]) -> list[tuple[list[int], str, str]]:
    """Exit codes, standard error and standard output of each run: a number of processes, a module, arguments for its `main`."""
    done = run_forked("tests/programs/processes.py", json.dumps(runs))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
