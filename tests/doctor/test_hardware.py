"""Faults of torch's device, its bfloat16, the driver's tool and the compiler."""

import pytest
import torch
from torch import nn

from lightning_peft.doctor.hardware import (
    check_bf16,
    check_compiler,
    check_device,
    check_torch,
    chosen_device,
    native_bf16,
)
from lightning_peft.doctor.results import Check

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program on an otherwise empty path."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(name, *lines):
        file = tmp_path / name
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)
        return file

    return write


def test_this_machine_computes():
    device = chosen_device("auto")
    assert device in ("cpu", "cuda")
    found = check_device(device)
    assert found.status == "ok"
    assert device in found.detail
    assert "GiB free" in found.detail


def test_a_device_that_computes_wrongly_is_found(monkeypatch):
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: real(*size, device=device) * 1.001)
    found = check_device("cpu")
    assert found.status == "failed"
    assert "64^3" in found.detail


@no_cuda
def test_a_device_that_is_not_there_is_a_finding():
    found = Check("device", lambda: check_device("cuda"), "another one").result()
    assert (found.name, found.status, found.remedy) == ("device", "failed", "another one")
    assert found.detail.startswith(("AssertionError", "RuntimeError"))


@no_cuda
@pytest.mark.parametrize(("device", "status"), [("auto", "warning"), ("cuda", "failed")])
def test_a_gpu_that_torch_does_not_see_is_found(program, device, status):
    program("nvidia-smi", 'echo "GPU 0: NVIDIA Something (UUID: GPU-1)"')
    found = check_torch(device)
    assert found.status == status
    assert "nvidia-smi lists GPU 0: NVIDIA Something, " in found.detail
    assert "https://pytorch.org/get-started/locally/" in found.remedy


@no_cuda
@pytest.mark.parametrize(
    ("hidden", "remedy"), [("", "CUDA_VISIBLE_DEVICES='' hides devices"), (None, "Update the")]
)
def test_a_gpu_that_a_cuda_build_does_not_see_is_found(program, monkeypatch, hidden, remedy):
    program("nvidia-smi", 'echo "GPU 0: NVIDIA Something (UUID: GPU-1)"')
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = check_torch("auto")
    assert found.status == "warning"
    assert "built for CUDA 12.8" in found.detail
    assert "but torch sees no CUDA device" in found.detail
    assert remedy in found.remedy


@no_cuda
@pytest.mark.parametrize("lines", [["exit 9"], ["echo No devices found"], None])
def test_a_driver_without_a_gpu_is_no_fault(program, lines):
    if lines:
        program("nvidia-smi", *lines)
    assert check_torch("auto").status == "ok"
    found = check_torch("cuda")
    assert found.status == "failed"
    assert "there is no CUDA device" in found.detail


class Wide(nn.Linear):
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Cancelling(nn.Linear):
    def forward(self, x):
        return (super().forward(x) + 1000) - 1000


def test_bf16_runs_here():
    found = check_bf16("cpu")
    assert found.status in ("ok", "warning")
    assert "autocast ran forward and backward" in found.detail


@pytest.mark.parametrize(
    ("kind", "detail"),
    [(Wide, "autocast gave torch.float32"), (Cancelling, "gradients are off by")],
)
def test_bf16_that_is_none_or_too_rough_is_found(kind, detail):
    found = check_bf16("cpu", kind(64, 64))
    assert found.status == "warning"
    assert detail in found.detail
    assert "32-true" in found.remedy


@pytest.mark.parametrize(
    ("line", "native", "status"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16", "AVX512-BF16, AMX", "ok"),
        ("flags\t\t: fpu avx512f avx2", "", "warning"),
        ("Features\t: fp asimd bf16 i8mm", "BF16", "ok"),
        ("Features\t: fp asimd i8mm", "", "warning"),
        ("isa\t\t: rv64", None, "ok"),
    ],
)
def test_native_bf16_is_read_from_the_processor(tmp_path, line, native, status):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\n")
    assert native_bf16("cpu", file) == native
    found = check_bf16("cpu", cpuinfo=file)
    assert found.status == status
    assert ("emulates" in found.detail) == (native == "")
    assert bool(found.remedy) == (native == "")


def test_bf16_of_an_unknown_processor_is_not_guessed(tmp_path):
    assert native_bf16("cpu", tmp_path / "none") is None


def test_a_compiler_that_works_is_shown(program):
    program("clang++", "echo clang version 99; echo more")
    found = check_compiler()
    assert (found.status, found.detail) == ("ok", "clang version 99")


def test_a_missing_and_a_broken_compiler_are_found(program, monkeypatch):
    missing = check_compiler()
    assert missing.status == "warning"
    assert "g++" in missing.detail
    assert "torch.compile" in missing.remedy
    program("g++", "echo cannot find cc1plus >&2", "exit 1")
    broken = check_compiler()
    assert broken.status == "warning"
    assert "cannot find cc1plus" in broken.detail
    program("works", "echo fine")
    monkeypatch.setenv("CXX", "works")
    assert check_compiler().detail == "fine"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_described():
    assert check_torch("cuda").status == "ok"
    assert "compute capability" in check_device("cuda").detail
    assert "autocast ran" in check_bf16("cuda").detail
