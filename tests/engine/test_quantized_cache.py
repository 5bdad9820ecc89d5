"""A base whose codes come out of the cache is the one that is quantized afresh, bit for bit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import model_of
from models import Holder, llama_config, saved_in_shards
from safetensors import SafetensorError
from torch.multiprocessing.reductions import StorageWeakRef
from toy_backend import ToyConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    conversion_mapping,
)

from lightning_peft import engine
from lightning_peft.arguments import LoRAFields
from lightning_peft.engine import cache_entries
from lightning_peft.engine.backends.bnb4 import FOUR_BIT
from lightning_peft.engine.backends.registry import is_quantized
from lightning_peft.engine.loading import quantized_cache, streamed_quantizer, weight_files
from lightning_peft.errors import UnsupportedError

CPU = torch.device("cpu")
EXPERTS = ("mixtral", "gpt-oss")


@pytest.fixture(autouse=True)
def bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that keeps small models too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_cache, "SMALLEST", 0)
    monkeypatch.setattr(weight_files, "_SETTLED_NS", -1)
    return tmp_path / "cache" / "lightning-peft" / "bases"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "intermediate_size": 128}
    llama = llama_config(**sizes, pad_token_id=0, attention_bias=True)
    tied = llama_config(**sizes, tie_word_embeddings=True)
    models = {
        "llama": LlamaForCausalLM(llama),
        "tied": LlamaForCausalLM(tied),
        "backbone": LlamaModel(llama),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(
                vocab_size=96,
                n_positions=32,
                n_embd=64,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
            )
        ),
    }
    models |= {name: model_of(name) for name in EXPERTS}
    models = {name: model.to(torch.bfloat16) for name, model in models.items()}
    return saved_in_shards(models, tmp_path_factory, "40KB")


def load(
    folder: Path,
    auto: Any = AutoModelForCausalLM,
    cached: bool = True,
    settings: Any = None,
    change: Any = None,
    **given: Any,
) -> tuple[Holder, bool, int]:
    """Loads and injects; also returns whether layers came quantized, and how many new entries."""
    holder, config = Holder(), engine.lora_config(LoRAFields(r=4))
    settings = settings or engine.quantization_config()
    torch.manual_seed(5)
    with engine.loading_for_injection(holder, config, settings, None, CPU, cached) as loading:
        holder.model = auto.from_pretrained(folder, **given)
        if change is not None:
            change(holder)
    early = any(is_quantized(layer) for layer in holder.modules())
    engine.inject(holder, config, quantization_config=settings)
    return holder, early, len(engine.store_quantized(holder, loading))


def assert_same(one: Holder, other: Holder) -> None:
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key
    for (name, mine), theirs in zip(one.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    params = zip(one.named_parameters(), other.named_parameters(), strict=True)
    for (name, mine), (_, its) in params:
        assert mine.requires_grad == its.requires_grad
        if hasattr(mine, "quant_state"):
            assert same_state(mine.quant_state, its.quant_state), name
            fields = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
            assert all(getattr(mine, field) == getattr(its, field) for field in fields)
    old, new = (engine.require_record(module).parts["model"] for module in (one, other))
    for field in ("base", "heads", "quantized", "quantization", "dense_bytes", "base_id"):
        assert getattr(old, field) == getattr(new, field), field
    assert str(engine.report(one)) == str(engine.report(other))
    assert one.model.config.to_dict() == other.model.config.to_dict()
    for switch in ("is_quantized", "hf_quantizer", "quantization_method"):
        assert getattr(one.model, switch, None) == getattr(other.model, switch, None)
    ignored = "_keys_to_ignore_on_load_unexpected"
    assert getattr(one.model, ignored) == getattr(other.model, ignored)
    assert not other.model._state_dict_hooks or one.model._state_dict_hooks


def same_state(a: Any, b: Any) -> bool:
    """Compares the bits of quantization states; bitsandbytes compares within a tolerance."""
    if a is None or b is None:
        return a is b
    tensors = [(getattr(a, n), getattr(b, n)) for n in ("absmax", "code", "offset")]
    return (
        all(x is y or (torch.equal(x, y) and x.dtype == y.dtype) for x, y in tensors)
        and (a.shape, a.dtype, a.blocksize, a.quant_type)
        == (b.shape, b.dtype, b.blocksize, b.quant_type)
        and same_state(a.state2, b.state2)
    )


def train(holder: Holder) -> list[float]:
    model = holder.model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    ids = torch.arange(32).view(4, 8)
    losses = []
    for _ in range(3):
        labels = ids if hasattr(model, "lm_head") else ids[:, 0] % 3
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", AutoModelForCausalLM, {}),
    "class": ("llama", LlamaForCausalLM, {"dtype": "bfloat16"}),
    "tied": ("tied", AutoModelForCausalLM, {}),
    "gpt2": ("gpt2", AutoModelForCausalLM, {}),
    "fresh head": ("backbone", AutoModelForSequenceClassification, {"num_labels": 3}),
    "experts": ("mixtral", AutoModelForCausalLM, {}),
    "experts in another dtype": ("mixtral", AutoModelForCausalLM, {"dtype": torch.float32}),
    "transposed experts": ("gpt-oss", AutoModelForCausalLM, {"dtype": torch.float32}),
    "another dtype": ("llama", AutoModelForCausalLM, {"dtype": torch.float32}),
    "gpt2 in another dtype": ("gpt2", AutoModelForCausalLM, {"dtype": torch.float32}),
}


SINGLE = engine.quantization_config(bnb_4bit_use_double_quant=False)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        *((case, engine.quantization_config()) for case in CASES),
        ("llama", SINGLE),
        ("gpt2", SINGLE),
        ("llama", ToyConfig()),
        ("another dtype", ToyConfig()),
    ],
)
def test_the_second_start_is_the_first(
    case: str, settings: Any, folders: dict[str, Path], bases: Path
) -> None:
    name, auto, given = CASES[case]
    plain, _, none = load(folders[name], auto, cached=False, settings=settings, **given)
    assert none == 0
    assert not bases.exists()
    first, _, made = load(folders[name], auto, settings=settings, **given)
    second, early, again = load(folders[name], auto, settings=settings, **given)
    assert (made, early, again) == (1, True, 0)
    assert len(list(bases.iterdir())) == 1
    for holder in (first, second):
        assert_same(plain, holder)
    losses = train(plain)
    assert train(second) == losses == train(first)
    assert losses[-1] < losses[0]
    assert_same(plain, second)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nothing_is_quantized_again(
    name: str, folders: dict[str, Path], bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders[name]
    load(folder, dtype="float32")
    seen: list[str] = []
    original = streamed_quantizer._QuantizeOne.convert

    def convert(self: Any, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.extend(tensors)
        return original(self, tensors, *args, **kwargs)

    monkeypatch.setattr(streamed_quantizer._QuantizeOne, "convert", convert)
    load(folder, dtype="float32")
    assert seen == []
    layers = json.loads((only(bases) / cache_entries.SUMMARY).read_text())["layers"]
    # Of two blocks, each with attention, and a dense feed-forward or two weights of experts.
    assert len(layers) == (14 if name == "llama" else 12)


def only(bases: Path) -> Path:
    (entry,) = bases.iterdir()
    return entry


@pytest.mark.parametrize("harm", ["bit", "cut", "remove", "summary", "layers"])
def test_a_damaged_entry_is_reported_and_made_anew(
    harm: str, folders: dict[str, Path], bases: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _, _ = load(folders["llama"], cached=False)
    load(folders["llama"])
    codes = only(bases) / "codes-00000.safetensors"
    summary = only(bases) / cache_entries.SUMMARY
    content = codes.read_bytes()
    if harm == "bit":
        codes.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut":
        codes.write_bytes(content[:-1])
    elif harm == "remove":
        codes.unlink()
    elif harm == "summary":
        summary.write_text("[]")
    else:
        known = json.loads(summary.read_text())
        known["layers"]["no.such.layer"] = next(iter(known["layers"].values()))
        summary.write_text(json.dumps(known))
    again, early, made = load(folders["llama"])
    assert (early, made) == (False, 1)
    assert "is damaged" in caplog.text
    assert_same(plain, again)
    assert codes.read_bytes() == content


def test_what_decides_the_codes_is_in_the_key(
    folders: dict[str, Path], bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders["llama"]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(other, max_shard_size="40KB")
    fp4 = engine.quantization_config(bnb_4bit_quant_type="fp4")
    skipping = engine.quantization_config(
        {"load_in_4bit": True, "llm_int8_skip_modules": ["down_proj"]}
    )
    ways: list[dict[str, Any]] = [
        {},
        {"folder": other},
        {"settings": fp4},
        {"settings": engine.quantization_config(bnb_4bit_use_double_quant=False)},
        {"settings": skipping},
        {"dtype": "float32"},
        {"num_hidden_layers": 1},
    ]
    for number, way in enumerate(ways, 1):
        assert load(**{"folder": folder, **way})[1:] == ("dtype" in way, 1)
        assert len(list(bases.iterdir())) == number
    # The place of the files, what only the product depends on, and words for people do not.
    monkeypatch.setattr(type(FOUR_BIT), "label", lambda self, fields: "other words")
    product = engine.quantization_config(bnb_4bit_compute_dtype="bfloat16")
    holder, early, made = load(copy, settings=product)
    assert (early, made) == (True, 0)
    assert holder.model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


def test_the_dtype_of_a_config_object_counts(folders: dict[str, Path]) -> None:
    config = LlamaConfig.from_pretrained(folders["llama"], dtype="float32")
    holder, early, _ = load(folders["llama"], LlamaForCausalLM, config=config)
    assert (holder.model.dtype, early) == (torch.float32, True)


def test_a_file_written_over_with_its_old_time_is_read_again(
    folders: dict[str, Path], tmp_path: Path, bases: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    load(folder)
    assert load(folder)[1]
    file = sorted(folder.glob("*.safetensors"))[1]
    before = file.stat()
    content = file.read_bytes()
    with file.open("r+b") as same:
        same.seek(-2, os.SEEK_END)
        same.write(bytes([content[-2] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    facts = ("st_size", "st_ino", "st_mtime_ns")
    assert all(getattr(after, fact) == getattr(before, fact) for fact in facts)
    changed, early, made = load(folder)
    assert (early, made) == (False, 1)
    assert_same(load(folder, cached=False)[0], changed)


def test_hashes_are_remembered_and_those_of_fresh_files_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, memory = tmp_path / "a", tmp_path / "hashes"
    file.write_bytes(b"one")
    monkeypatch.setattr(weight_files, "_SETTLED_NS", 10**12)
    (fresh,) = weight_files.hashes([file], memory)
    assert not memory.exists()
    monkeypatch.setattr(weight_files, "_SETTLED_NS", -1)
    assert weight_files.hashes([file], memory) == [fresh]
    (note,) = memory.iterdir()
    known = json.loads(note.read_text())
    note.write_text(json.dumps({**known, "sha256": "remembered"}))
    assert weight_files.hashes([file], memory) == ["remembered"]
    note.write_text("{")
    assert weight_files.hashes([file], memory) == [fresh]


def scaled(holder: Holder) -> None:
    holder.model.model.layers[0].mlp.up_proj.weight.data.mul_(2)


def test_changed_weights_are_not_kept(folders: dict[str, Path], bases: Path) -> None:
    changed, _, _ = load(folders["llama"], change=scaled)
    assert (
        "model.layers.0.mlp.up_proj"
        not in json.loads((only(bases) / cache_entries.SUMMARY).read_text())["layers"]
    )
    again, early, _ = load(folders["llama"], change=scaled)
    assert early
    assert_same(changed, again)


def test_a_change_to_codes_is_refused(folders: dict[str, Path]) -> None:
    load(folders["llama"])
    with pytest.raises(UnsupportedError, match="would be lost"):
        load(folders["llama"], change=scaled)

    def replaced(holder: Holder) -> None:
        layer = holder.model.model.layers[0].mlp.up_proj
        layer._parameters["weight"] = type(layer._parameters["weight"])(
            torch.ones(128, 64), requires_grad=False
        ).to(CPU)

    with pytest.raises(UnsupportedError, match="cache_quantized_base=False"):
        load(folders["llama"], change=replaced)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_teacher_beside_it_is_dense_as_it_was(name: str, folders: dict[str, Path]) -> None:
    def teach(holder: Holder) -> None:
        holder.__dict__["teacher"] = AutoModelForCausalLM.from_pretrained(folders[name])

    first, _, _ = load(folders[name], change=teach)
    second, early, made = load(folders[name], change=teach)
    assert (early, made) == (True, 0)
    assert_same(first, second)
    a, b = (holder.__dict__["teacher"] for holder in (first, second))
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    assert not any(is_quantized(layer) for layer in b.modules())
    for (name, mine), its in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(mine, its), name
        assert mine.requires_grad == its.requires_grad


def test_weights_that_are_not_in_the_file_are_not_kept(
    folders: dict[str, Path], bases: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(folders["llama"])
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path / "less", state_dict=state)
    for dtype in ("auto", "float32"):
        plain, _, _ = load(tmp_path / "less", cached=False, dtype=dtype)
        load(tmp_path / "less", dtype=dtype)
        again, early, _ = load(tmp_path / "less", dtype=dtype)
        assert early
        assert_same(plain, again)
    layers = [
        json.loads((e / cache_entries.SUMMARY).read_text())["layers"] for e in bases.iterdir()
    ]
    assert [len(found) for found in layers] == [13, 13]


NOT_COVERED: dict[str, dict[str, Any]] = {
    "own device": {"device_map": {"": "cpu"}},
    "names changed": {"key_mapping": {"^never$": "x"}},
}


@pytest.mark.parametrize("case", NOT_COVERED)
def test_what_is_not_covered_loads_as_before(
    case: str, folders: dict[str, Path], bases: Path
) -> None:
    for _ in range(2):
        _, early, made = load(folders["llama"], **NOT_COVERED[case])
        assert (early, made) == (False, 0)
    assert not bases.exists()


def test_a_full_disk_is_left_alone(
    folders: dict[str, Path],
    bases: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 9 * 10**8, 10**8))
    assert load(folders["llama"])[1:] == (False, 0)
    assert list(bases.iterdir()) == []
    assert "nearly full" in caplog.text


def test_a_small_model_is_not_kept(
    folders: dict[str, Path], bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_cache, "SMALLEST", 1 << 20)
    assert load(folders["llama"])[1:] == (False, 0)
    assert not bases.exists()


def test_an_interrupted_or_failing_write_leaves_no_entry(
    folders: dict[str, Path],
    bases: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def failing(*args: Any, **kwargs: Any) -> None:
        raise failures.pop()("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(quantized_cache, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(folders["llama"])
        assert list(bases.iterdir()) == []
        patch.setattr(quantized_cache, "save_file", failing)
        failures: list[type[Exception]] = [OSError, SafetensorError]
        while failures:
            assert load(folders["llama"])[2] == 0
    assert list(bases.iterdir()) == []
    assert caplog.text.count("is not kept: no space left") == 2
    assert load(folders["llama"])[2] == 1


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_only_one_process_of_a_machine_writes(
    name: str, folders: dict[str, Path], bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(name, "1")
    assert load(folders["llama"])[2] == 0
    assert not bases.exists()


WRITER = """
import sys, torch
from torch import nn
from transformers import AutoModelForCausalLM
from lightning_peft import engine
from lightning_peft.engine.loading import quantized_cache
quantized_cache.SMALLEST = 0
holder, config, settings = nn.Module(), engine.lora_config(), engine.quantization_config()
print("ready", flush=True)
sys.stdin.readline()
with engine.loading_for_injection(
    holder, config, settings, None, torch.device("cpu"), True
) as loading:
    holder.model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.manual_seed(0)
engine.inject(holder, config, quantization_config=settings)
engine.store_quantized(holder, loading)
"""


@pytest.mark.long
def test_processes_at_the_same_time_leave_one_entry(folders: dict[str, Path], bases: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(folders["llama"])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(120) for process in running] == [0, 0]
    assert cache_entries.damage_of(only(bases)) is None
    plain, _, _ = load(folders["llama"], cached=False)
    again, early, _ = load(folders["llama"])
    assert early
    assert_same(plain, again)


def test_codes_stay_in_memory_between_runs(folders: dict[str, Path], bases: Path) -> None:
    fresh, _, stored = load(folders["llama"])
    assert stored == 1
    with engine.quantized_bases_kept():
        first, early, _ = load(folders["llama"])
        losses = train(first)
        # What is not read from there any more cannot be read again.
        for file in bases.rglob("*.safetensors"):
            file.unlink()
        second, again, _ = load(folders["llama"])
        assert early
        assert again
        assert_same(fresh, second)
        weights = [codes_of(holder) for holder in (first, second)]
        assert weights[0].data_ptr() == weights[1].data_ptr()
        assert train(second) == losses
        # A run that changes codes in place does not change the next one's.
        weights[1][0] += 1
        third, from_cache, _ = load(folders["llama"])
        assert not from_cache
        assert_same(fresh, third)
        for file in bases.rglob("*.safetensors"):
            file.unlink()
    # Outside nothing is kept.
    _, after, _ = load(folders["llama"])
    assert not after


def test_one_base_stays_in_memory(
    folders: dict[str, Path], bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folders["llama"])
    read = quantized_cache._read

    def kept() -> StorageWeakRef:
        holder, early, _ = load(folders["llama"])
        assert early
        return StorageWeakRef(codes_of(holder).untyped_storage())

    with engine.quantized_bases_kept():
        first = kept()
        gc.collect()
        assert not first.expired()

        def checked(*given: Any) -> Any:
            # Before the next one comes, as there may not be memory for two.
            assert first.expired()
            return read(*given)

        monkeypatch.setattr(quantized_cache, "_read", checked)
        load(folders["gpt2"])
        assert first.expired()
        second = kept()
        # A run without codes needs the memory too.
        with engine.loading_for_injection(Holder(), engine.lora_config(), None, None, CPU):
            gc.collect()
            assert not second.expired()
        assert second.expired()


def codes_of(holder: Holder) -> torch.Tensor:
    return next(p.data for p in holder.parameters() if hasattr(p, "quant_state"))


def test_conversions_of_the_user_are_not_covered(
    folders: dict[str, Path], bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = conversion_mapping.USER_REGISTERED_MAPPINGS
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", {"llama"})
    assert load(folders["llama"])[1:] == (False, 0)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", names)
    assert load(folders["llama"])[1:] == (False, 1)
