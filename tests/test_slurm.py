"""train.sbatch's way of running: two launchers, as on two nodes, one of which is told that its time is up."""

import os
import shutil
import signal
import subprocess

import pytest
import torch

import main
from tests.conftest import FEW_STEPS, ROOT, finish, read_log, start, wait_for
from tests.programs.processes import free_port

pytestmark = pytest.mark.slow


def test_one_node_is_signalled_both_end_with_85_and_one_goes_on(digits_folder, tmp_path):
    launch = ["tools/launch.py", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=7"]
    flags = [*FEW_STEPS, "--model=recnext_m0", "--epochs=3", "--checkpoint-steps=1", "--distillation-type=none", "--resume=auto"]
    flags += [f"--data-path={digits_folder}", f"--output_dir={tmp_path}"]
    nodes = [start(*launch, "main.py", *flags, "--batch-size=8") for _ in range(2)]
    wait_for(tmp_path / "checkpoint_last.pth", nodes[0])
    nodes[1].send_signal(signal.SIGUSR1)
    outs = [finish(node, 85) for node in nodes]
    assert sum("told to stop: saved after" in out for out in outs) >= 1
    saved = torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)
    assert (saved["epoch"], saved["step"]) < (2, 0)
    assert main.main(flags) == 0  # on as many images a step
    assert [record["epoch"] for record in read_log(tmp_path)] == [0, 1, 2]


def test_launch_reports_other_failures_with_their_code(tmp_path):
    done = finish(start("tools/launch.py", "--nproc_per_node=2", "main.py", "--data-path", str(tmp_path / "nowhere")), 1)
    assert done.count("error: --data-path") == 1


@pytest.mark.parametrize(("code", "requeued"), [(85, True), (0, False), (1, False)])
def test_batch_script_requeues_itself_after_85_alone(tmp_path, code, requeued):
    """srun and scontrol are stood in for; the script is run as it is."""
    for name, body in (("srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}'), ("scontrol", f'echo "$@" >> {tmp_path}/scontrol.txt; echo head')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    done = subprocess.run([shutil.which("bash"), "train.sbatch", "--model", "recnext_m1"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    command = (tmp_path / "srun.txt").read_text()
    assert (
        "--nnodes 2 --nproc_per_node 8" in command
        and "--rdzv-endpoint head:29500" in command
        and command.rstrip().endswith("main.py --model recnext_m1 --resume auto")
    )
    assert ("requeue 42" in (tmp_path / "scontrol.txt").read_text()) == requeued
    directives = (ROOT / "train.sbatch").read_text()
    assert "#SBATCH --signal=USR1@120" in directives and "#SBATCH --requeue" in directives
