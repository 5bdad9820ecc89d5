"""What is on disk: small, whole, self-describing, refused where it does not fit."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil

import pytest
import torch
from modules import (
    ROOTS,
    Linears,
    differing,
    lightning,
    loader,
    outputs,
    saver,
    strategy,
    task,
    task_class,
    trainer,
    weights,
)
from peft import PeftModel

from lightning_peft.errors import BaseMismatchError, CheckpointError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY


def size_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fitted(folder, method="lora", root=ROOTS[0], module=None, **given):
    """Trains for one epoch, saving at its end; returns module, trainer and the file."""
    module = module or task(root)
    points = saver(root, folder, filename="one")
    run = trainer(folder / "root", method, root, callbacks=[points], **given)
    run.fit(module, loader(module.kind))
    return module, run, folder / "one.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The file of a run with LoRA."""
    return fitted(tmp_path_factory.mktemp("trained"))[2]


@pytest.fixture
def file(trained, tmp_path):
    """A copy of it, which a test may change."""
    return shutil.copy(trained, tmp_path / "one.ckpt")


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "linears", "wide"])
def test_size(kind, method, tmp_path, record_property):
    module, run, file = fitted(tmp_path, method, module=task(kind=kind), max_steps=1)
    trained = [param for param in module.parameters() if param.requires_grad]
    states = [
        value
        for state in run.optimizers[0].state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    needed = size_of(trained) + size_of(module.buffers()) + size_of(states)
    size, base = file.stat().st_size, size_of(task(kind=kind).parameters())
    record_property("bytes", {"file": size, "needed": needed, "base": base})
    assert size <= 1.05 * needed + 64 * 1024
    if kind == "wide":
        assert base > 80e6
        assert size < 0.05 * base
    # And it is read without trust.
    loaded = torch.load(file, weights_only=True)
    assert not [key for key in loaded["state_dict"] if key.endswith("layers.1.weight")]


@pytest.mark.parametrize(
    ("save_last", "small", "root"),
    [(True, False, ROOTS[0]), ("link", False, ROOTS[1]), (True, True, ROOTS[0])],
)
def test_folders_come_and_go_with_checkpoints(save_last, small, root, tmp_path):
    given = {"save_last": save_last, "save_weights_only": small}
    best = saver(root, tmp_path, monitor="val_loss", save_top_k=2, **given)
    module = task(root, kind="llama")
    run = trainer(tmp_path / "root", "qlora", root, callbacks=[best], max_epochs=4)
    run.fit(module, loader("llama"), loader("llama"))
    files = {path.stem for path in tmp_path.glob("*.ckpt") if not path.is_symlink()}
    folders = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert folders == files
    assert len(files) == (3 if save_last is True else 2)
    assert ("last" in files) == (save_last is True)

    # `last` is the file, never the folder, even where the folder is younger.
    os.utime(tmp_path / "adapters")
    results = run.validate(module, loader("llama"), ckpt_path="last", verbose=False)
    assert results[0]["val_loss"] == pytest.approx(float(best.best_model_score), abs=1e-6)

    for name in files:
        content = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert ("optimizer_states" in content) is not small
        assert not [key for key in content["state_dict"] if key.endswith("up_proj.weight")]
        run.strategy.remove_checkpoint(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "adapters").exists()


def test_the_folder_is_in_the_format_of_peft(tmp_path):
    module, _, file = fitted(tmp_path, module=task(kind="llama"))
    folder = tmp_path / "adapters" / "one"
    facts = json.loads((folder / "provenance.json").read_text())
    assert (facts["epoch"], facts["global_step"]) == (0, 6)
    assert facts["versions"]["peft"]
    plain = PeftModel.from_pretrained(task(kind="llama").model, folder).eval()
    ids = next(iter(loader("llama")))["ids"]
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, outputs(module, "llama"))
    assert not list(tmp_path.rglob(".incomplete-*"))


def test_a_folder_that_was_moved_aside_is_put_back(tmp_path, monkeypatch):
    """By a process that was killed before the new one had its name."""
    _, run, file = fitted(tmp_path)
    folder, rename = tmp_path / "adapters" / "one", os.replace
    before = (folder / "adapter_model.safetensors").read_bytes()

    def killed(source, target):
        if target == folder:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(file)
    assert not folder.exists()
    trainer(tmp_path).fit(task(), loader(), ckpt_path=file)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert not list(folder.parent.glob(".replaced-*"))


class Killed(BaseException):
    """A process that ends here."""


def test_a_folder_that_is_ahead_of_its_checkpoint_is_written_again(tmp_path, monkeypatch):
    """By a process that was killed between the two, which have the names of those before."""
    _, _, file = fitted(tmp_path)
    adapter, rename = tmp_path / "adapters" / "one" / "adapter_model.safetensors", os.replace
    before, seen = adapter.read_bytes(), []

    def killed(source, target):
        if target == file:
            raise Killed
        rename(source, target)

    given = {"max_epochs": 2, "enable_checkpointing": True}
    points = saver(ROOTS[0], tmp_path, filename="one", enable_version_counter=False)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            trainer(tmp_path, callbacks=[points], **given).fit(task(), loader(), ckpt_path=file)
    assert adapter.read_bytes() != before
    module = task()
    module.on_train_batch_start = lambda batch, batch_idx: seen.append(adapter.read_bytes())
    trainer(tmp_path, **given).fit(module, loader(), ckpt_path=file)
    assert seen[0] == before
    assert json.loads(adapter.with_name("provenance.json").read_text())["global_step"] == 6


def test_names_with_dots_and_without_suffix(tmp_path):
    module, run, _ = fitted(tmp_path)
    for name in ("val=0.51", "val=0.52", "plain"):
        run.save_checkpoint(tmp_path / name)
        assert (tmp_path / "adapters" / name / "adapter_model.safetensors").is_file()
        trainer(tmp_path).validate(task(), loader(), ckpt_path=tmp_path / name, verbose=False)


def altered(file, change):
    """Rewrites a checkpoint after ``change`` was applied to it."""
    loaded = torch.load(file, weights_only=True)
    change(loaded)
    torch.save(loaded, file)
    return file


def drop(loaded):
    key = next(key for key in loaded["state_dict"] if "lora_B" in key)
    del loaded["state_dict"][key]


def add(loaded):
    loaded["state_dict"]["model.layers.9.lora_A.default.weight"] = torch.zeros(1)


def reshape(loaded):
    loaded["state_dict"]["model.head.bias"] = torch.zeros(4)


def newer(loaded):
    loaded[CHECKPOINT_KEY]["format"] = 99


FILE_PROBLEMS = [
    (drop, r"missing: model\.layers\.0\.lora_B\.default\.weight"),
    (add, r"unexpected: model\.layers\.9\.lora_A\.default\.weight"),
    (reshape, r"model\.head\.bias: \(4,\) in the checkpoint, \(3,\) in the module"),
    (newer, "has format 99"),
]


@pytest.mark.parametrize(("change", "message"), FILE_PROBLEMS)
def test_a_file_that_does_not_fit_is_refused(change, message, file, tmp_path):
    altered(file, change)
    other = task()
    other.strict_loading = False
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path).validate(other, loader(), ckpt_path=file, verbose=False)


SETTINGS = [
    ("lora", {"r": 8}, r"r=4 in the checkpoint and 8 now"),
    ("lora", {"lora_alpha": 3}, r"lora_alpha=8 in the checkpoint and 3"),
    ("lora", {"target_modules": ["layers.0"]}, r"'model\.layers\.1' is adapted in the checkpoint"),
    ("lora", {"modules_to_save": ["norm"]}, r"modules_to_save=None in the checkpoint"),
    ("lora", {"adapt": "model"}, r"part '' is adapted in the checkpoint only"),
    ("lora", {"use_rslora": True}, r"use_rslora=False in the checkpoint and True now"),
    ("qlora", {}, "quantization is None in the checkpoint and {"),
]


@pytest.mark.parametrize(("method", "settings", "message"), SETTINGS)
def test_other_settings_are_refused(method, settings, message, trained, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        trainer(tmp_path, strategy(method, **settings)).validate(
            task(), loader(), ckpt_path=trained
        )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_another_base_is_refused(method, tmp_path):
    _, _, file = fitted(tmp_path, method)
    other = task()
    with torch.no_grad():
        other.model.layers[1].weight[0, 0] += 0.5
    with pytest.raises(BaseMismatchError, match=r"layers\.1\.weight"):
        trainer(tmp_path, method).fit(other, loader(), ckpt_path=file)


def test_a_checkpoint_of_the_whole_model_is_refused(tmp_path):
    module = task()
    run = trainer(tmp_path, "auto")
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    with pytest.raises(CheckpointError, match="load it into the module first"):
        trainer(tmp_path).fit(task(), loader(), ckpt_path=tmp_path / "full.ckpt")


@pytest.mark.parametrize("place", ["init", "configure_model"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_whoever_loads_without_this_package_is_stopped(place, settings, tmp_path):
    _, _, file = fitted(tmp_path, strategy(**settings), module=task(place=place))
    cls = task_class(ROOTS[0], place)
    with pytest.raises(RuntimeError, match="load this file with lightning_peft"):
        cls.load_from_checkpoint(file)
    with pytest.raises(RuntimeError, match="size mismatch"):
        cls.load_from_checkpoint(file, strict=False)
    with pytest.raises(RuntimeError, match="load this file with lightning_peft"):
        trainer(tmp_path, "auto").validate(task(place=place), loader(), ckpt_path=file)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_hostile_file_is_refused(writer, tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "hostile.ckpt"
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "x": Hostile(marker)}
    if writer == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    run = trainer(tmp_path)
    with pytest.raises(CheckpointError, match="could run code, so nothing of it was executed"):
        run.fit(task(), loader(), ckpt_path=file)
    assert not marker.exists()
    if writer == "torch":
        with pytest.raises(CheckpointError, match="not written with adapters"):
            trainer(tmp_path).fit(task(), loader(), ckpt_path=file, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept, file, tmp_path):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"one\.ckpt' is not a complete checkpoint"):
        trainer(tmp_path).fit(task(), loader(), ckpt_path=file)


def test_other_files_are_refused(tmp_path):
    text, tensor = tmp_path / "text.ckpt", tmp_path / "tensor.ckpt"
    text.write_text("hello world\n" * 10)
    torch.save(torch.zeros(1), tensor)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        trainer(tmp_path).validate(task(), loader(), ckpt_path=text)
    with pytest.raises(CheckpointError, match="no `state_dict`"):
        trainer(tmp_path).validate(task(), loader(), ckpt_path=tensor)
    with pytest.raises(FileNotFoundError):
        trainer(tmp_path).validate(task(), loader(), ckpt_path=tmp_path / "absent.ckpt")


def test_objects_of_the_user_in_a_checkpoint_are_announced(tmp_path, caplog):
    class Keeping(task_class(ROOTS[0])):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = Linears(2, 1)

    module = Keeping()
    with caplog.at_level(logging.WARNING, logger="lightning_peft"):
        _, run, file = fitted(tmp_path, module=module, max_epochs=2)
    report = [r for r in caplog.records if "only weights_only=False can load it" in r.message]
    assert len(report) == 1
    assert "modules.Linears" in report[0].getMessage()
    with pytest.raises(CheckpointError, match="pass weights_only=False"):
        trainer(tmp_path).validate(Keeping(), loader(), ckpt_path=file)
    trainer(tmp_path).validate(
        Keeping(), loader(), ckpt_path=file, weights_only=False, verbose=False
    )


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("kind", ["own", "wrapping", "asynchronous"])
def test_the_users_checkpoint_io(kind, root, tmp_path):
    plugins = lightning(root).plugins.io

    class Own(plugins.TorchCheckpointIO):
        calls: list[str] = []

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.calls.append("save")
            super().save_checkpoint(checkpoint, path, storage_options)

        def remove_checkpoint(self, path):
            self.calls.append("remove")
            super().remove_checkpoint(path)

    io = {
        "own": lambda: Own(),
        "wrapping": lambda: plugins.AsyncCheckpointIO(Own()),
        "asynchronous": lambda: plugins.AsyncCheckpointIO(),
    }[kind]()
    module = task(root)
    points = saver(root, tmp_path, monitor="val_loss", save_top_k=1)
    run = trainer(tmp_path, "lora", root, plugins=[io], callbacks=[points], max_epochs=3)
    run.fit(module, loader(), loader())
    if kind == "asynchronous":
        assert type(io.checkpoint_io).__name__ == "WholeFileCheckpointIO"
    else:
        assert Own.calls.count("save") >= 1
    assert run.strategy.checkpoint_io is io
    files = list(tmp_path.glob("*.ckpt"))
    assert [path.stem for path in files] == [p.name for p in (tmp_path / "adapters").iterdir()]
    fresh = task(root)
    trainer(tmp_path, "lora", root).validate(fresh, loader(), ckpt_path=files[0], verbose=False)
    assert not differing(weights(fresh), weights(module))
    files[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        trainer(tmp_path, "lora", root, plugins=[io]).validate(fresh, ckpt_path=files[0])
