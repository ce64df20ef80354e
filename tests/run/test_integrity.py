"""Checksums inside archives: every bit counts, and readers that know nothing of them read on."""

import io
import os
import random
import tarfile
import zipfile

import pytest
import torch

from deployment import weights
from run import checkpoint, integrity
from run.errors import InputError


def archive(content=None) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.arange(30.0)}} if content is None else content, buffer)
    return buffer.getvalue()


def sealed(content=None) -> bytes:
    buffer = io.BytesIO(archive(content))
    integrity.seal(buffer)
    return buffer.getvalue()


def tar() -> bytes:
    """An archive that torch takes for one of its first format."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def is_noticed(data: bytes) -> bool:
    file = io.BytesIO(data)
    return integrity.is_sealed(file) and not integrity.is_intact(file)


def test_every_flipped_bit_is_noticed():
    """Headers, padding, the archive's own checksums, the comment and its length included."""
    data = sealed()
    assert integrity.is_sealed(io.BytesIO(data)) and integrity.is_intact(io.BytesIO(data))
    unnoticed = []
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        if not is_noticed(bytes(damaged)):
            unnoticed.append(bit)
    assert unnoticed == []


def test_every_other_length_is_noticed(tmp_path):
    """A file cut so far that nothing of the checksum is left is no archive any more; `checkpoint.read` refuses both."""
    data = sealed()
    num_unsealed = 0
    for length in range(len(data)):
        is_unsealed = not is_noticed(data[:length])
        num_unsealed += is_unsealed
        assert not is_unsealed or not zipfile.is_zipfile(io.BytesIO(data[:length]))
    assert num_unsealed > 0
    for appended in (b"\0", os.urandom(100), bytes(3000)):
        assert is_noticed(data + appended)
    path = tmp_path / "w.pth"
    for length in random.Random(0).sample(range(len(data)), 20):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"w\.pth is (damaged|no complete checkpoint|refused)"):
            checkpoint.read(str(path))


def test_torch_and_zipfile_read_sealed_files(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(sealed())
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)["model"]["w"], torch.arange(30.0))
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None


def test_files_without_a_checksum_are_told_from_damaged_ones():
    assert not integrity.is_sealed(io.BytesIO(archive()))
    assert not integrity.is_sealed(io.BytesIO(b"")) and not integrity.is_sealed(io.BytesIO(b"text"))
    commented = io.BytesIO(archive())
    with zipfile.ZipFile(commented, "a") as opened:
        opened.comment = b"of another program"
    assert not integrity.is_sealed(commented)


def test_only_our_own_files_without_a_checksum_are_remarked_on(tmp_path, caplog):
    caplog.set_level("INFO", "understudy")
    for name, content, is_remarked in (("ours", {"model": {}, "args": {"lr": 1.0}}, True), ("published", {"model": {}}, False)):
        (tmp_path / f"{name}.pth").write_bytes(archive(content))
        caplog.clear()
        checkpoint.read(str(tmp_path / f"{name}.pth"))
        assert ("carries no checksum" in caplog.text) == is_remarked
        (tmp_path / f"{name}.pth").write_bytes(sealed(content))
        caplog.clear()
        checkpoint.read(str(tmp_path / f"{name}.pth"))
        assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (bytes(10_000), "it starts with zeros"),
        (sealed()[:-500], "it is cut off"),
        (b"hello, this is text", "no complete checkpoint"),
        (random.Random(1).randbytes(5000), "w.pth is"),
        (tar(), "its content makes no sense"),
    ],
)
def test_messages_name_the_fault_and_never_advise_running_what_is_in_the_file(tmp_path, content, words):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    for read in (checkpoint.read, weights.read_file):
        with pytest.raises(InputError, match=words) as error:
            read(str(path))
        assert "weights_only" not in str(error.value) and "weights only" not in str(error.value).lower() and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_damaged_programs_are_not_run(tmp_path):
    path = tmp_path / "net.pt"
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 3)), buffer)
    integrity.seal(buffer)
    path.write_bytes(buffer.getvalue())
    assert weights.load_torchscript(path)[0](torch.zeros(1, 3)).shape == (1, 3)
    data = bytearray(buffer.getvalue())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"net\.pt is damaged"):
        weights.load_torchscript(path)
