import pytest
import torch

from lightning_peft.errors import ConfigError
from lightning_peft.plan.device_memory import device_memory, readable


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("24GB", 24e9), ("24 gb", 24e9), ("22.5GiB", 22.5 * 2**30), ("800MB", 8e8), ("6g", 6e9),
        ("rtx4090", 24e9), ("RTX 4090", 24e9), ("4090", 24e9), ("NVIDIA GeForce RTX 3060", 12e9),
        ("a100-40", 40e9), ("A100 80GB", 80e9), ("Tesla T4", 16e9), ("H100", 80e9),
        ("NVIDIA A100-SXM4-40GB", 40e9), ("h100-80", 80e9),
    ],
)  # fmt: skip
def test_words_for_devices(words, size):
    assert device_memory(words).bytes == round(size)
    assert device_memory(words).kind == "cuda"


def test_this_is_what_is_free_here():
    device = device_memory("this")
    assert device.kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.bytes > 1e8


@pytest.mark.parametrize("words", ["a100", "rtx4091", "0GB", ".GB", "1.2.3GB", "-3GB", "", "24"])
def test_other_words_are_refused(words):
    with pytest.raises(ConfigError, match="24GB"):
        device_memory(words)


def test_sizes_as_makers_count():
    assert [readable(x) for x in (7.24e9, 168e6, 1.5e6, 4e3, 101e9)] == [
        "7.2 GB", "168 MB", "1.5 MB", "4 kB", "101 GB",
    ]  # fmt: skip
