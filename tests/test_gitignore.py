"""What clones, runs, commands and tests leave behind is no part of a commit; what belongs to the project is."""

import subprocess

import pytest

from tests.conftest import ROOT

LEFT_BEHIND = [
    "__pycache__/a.pyc", "model/__pycache__/a.pyc", ".pytest_cache/a", ".ruff_cache/a", "checkpoints/m1/log.txt", "data/digits/a.jpg", "wandb/a", "slurm-1.out",
    "pretrain/a.pth", "hub/a/config.json", "a.onnx", "exports/a.onnx", "exports/a.onnx.data", "a.mlpackage/Manifest.json", "a.mlmodel", "a.pt2", "a.pt",
    "a.safetensors", "speed.json", "latency.md", "latency.svg", "photos.csv", "cat.png", "curves.html", "docs/receptive_field.json", ".a.onnx.partial/a",
]  # fmt: skip


@pytest.mark.parametrize("is_link", [True, False])
def test_git_ignores_what_clones_runs_and_tests_leave_behind(tmp_path, is_link):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    kept = ["README.md", "docs/demo.svg", "logs/a.txt", "run/a.py", "tests/golden/a.pth", "tests/golden/labels/a.json", "recipes/a.yaml"]
    for name in (*LEFT_BEHIND, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".venv").symlink_to(ROOT) if is_link else (tmp_path / ".venv").mkdir()
    listed = subprocess.run(["git", "ls-files", "--others", "--exclude-standard"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert set(listed.splitlines()) == {".gitignore", *kept}
