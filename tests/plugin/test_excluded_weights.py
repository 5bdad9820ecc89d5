"""Frozen weights outside of the adapted parts: which checkpoints hold, and how others come back."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L
import torch
from lightning.fabric import Fabric
from modules import ROOTS, differing, resumed, strategy, trainer, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM, BertModel

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import BaseMismatchError, ConfigError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY
from lightning_peft.plugin.namespace import bind_to_lightning

WORDS = "encoder.embeddings.word_embeddings.weight"
BIAS = "encoder.embeddings.LayerNorm.bias"


def bert(width: int) -> BertModel:
    size = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, intermediate_size=32, max_position_embeddings=8, **size)
    return BertModel(config, add_pooling_layer=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> str:
    """The folder of a pretrained encoder."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("encoder")
    bert(16).save_pretrained(folder)
    return str(folder)


class Guided(L.LightningModule):
    """A student, a pretrained encoder, and a teacher with random weights."""

    def __init__(self, folder: str, dtype: str = "float32", scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.student, self.proj, self.teacher = bert(8), nn.Linear(8, 16), nn.Linear(16, 16)
        self.encoder = BertModel.from_pretrained(folder, dtype=dtype, add_pooling_layer=False)
        self.encoder.requires_grad_(False)
        self.teacher.requires_grad_(False).weight.mul_(scale)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            seen = self.encoder(batch).last_hidden_state
            target = self.teacher(seen.to(self.teacher.weight.dtype))
        loss = F.mse_loss(self.proj(self.student(batch).last_hidden_state), target)
        self.losses.append(loss.item())
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


def data() -> DataLoader:
    return DataLoader(torch.randint(0, 32, (8, 5), generator=torch.Generator().manual_seed(5)), 2)


def fit(folder: Path, module: Any, exclude: Any = None, method: Any = "lora", **given: Any) -> Any:
    """Fits, and returns the path of a checkpoint and the names of what it holds of the module."""
    if isinstance(method, str):
        method = strategy(method, ROOTS[0], exclude_from_checkpoint=exclude)
    run = trainer(folder / "root", method, ROOTS[0], **given)
    run.fit(module, data())
    path = folder / "run.ckpt"
    run.save_checkpoint(path)
    return path, held(path)


def held(path: Path) -> set[str]:
    """Returns names of frozen weights in a file; those of submodules that it holds in full."""
    content = torch.load(path, weights_only=True)
    described = content[CHECKPOINT_KEY]
    assert described["format"] == (2 if "excluded" in described else 1)
    names = {name for name, value in content["state_dict"].items() if value.numel()}
    assert {"proj.weight", "proj.bias"} < names
    frozen = {name for name in names if name.startswith(("encoder.", "teacher."))}
    assert frozen.isdisjoint(described.get("excluded", {}))
    return frozen


def noted(module: nn.Module) -> set[str]:
    """Returns the names of the weights that are left out by default."""
    if engine.record_of(module) is None:
        lightning_peft.inject(module, r=2)
    else:
        engine.note_excluded(module)
    return {*engine.excluded_weights(module)}


def all_of(module: nn.Module, *owners: str) -> set[str]:
    return {n for n, _ in module.named_parameters() if n.partition(".")[0] in owners}


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (None, ["teacher"]),
        ([], ["teacher", "encoder"]),
        ("teacher", ["encoder"]),
        (["teacher", "encoder"], []),
    ],
)
def test_what_is_left_out_comes_back_with_the_module(exclude, expected, files, tmp_path) -> None:
    module = Guided(files)
    path, found = fit(tmp_path, module, exclude)
    assert found == all_of(module, *expected)
    report = lightning_peft.report(module)
    assert {"encoder", "teacher"} - {*expected} == set(report.excluded)
    assert report.excluded.get("teacher", 1088) == 1088
    assert ("MB more, which load again" in str(report)) == bool(report.excluded)
    loaded = lightning_peft.load_from_checkpoint(Guided, path)
    assert not differing(weights(loaded), weights(module))
    fresh = Guided(files)
    trainer(tmp_path, "lora", ROOTS[0]).validate(fresh, data(), ckpt_path=path, verbose=False)
    assert not differing(weights(fresh), weights(module))


@pytest.mark.parametrize("method", ["qlora", "callback"])
def test_a_resumed_run_is_the_uninterrupted_one(method, files, tmp_path) -> None:
    def run(**given: Any) -> Any:
        module, ours = Guided(files), strategy("qlora", ROOTS[0])
        if method == "callback":
            made = bind_to_lightning(lightning_peft.LoRACallback, ROOTS[0])(r=2, announce=False)
            given["callbacks"], ours = [*given.get("callbacks", []), made], "auto"
        path = given.pop("ckpt_path", None)
        trainer(tmp_path, ours, ROOTS[0], **given).fit(module, data(), ckpt_path=path)
        return module

    module, _ = resumed(run, tmp_path, 2)
    assert held(tmp_path / "step=2.ckpt") == all_of(module, "teacher")


class Moving(Guided):
    """Changes frozen weights while it trains, by less than bfloat16 has digits for."""

    def on_train_batch_end(self, *args: Any) -> None:
        self.get_parameter(WORDS).data[3, 2] += 1e-5
        self.teacher.weight.data[1, 0] += 1e-5


@pytest.mark.parametrize(("exclude", "changed"), [(None, WORDS), (["teacher"], "teacher.weight")])
def test_what_changes_is_in_the_file(exclude, changed, files, tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING, "lightning_peft")
    module = Moving(files)
    path, found = fit(tmp_path, module, exclude)
    kept = all_of(module, "teacher" if exclude is None else "encoder")
    assert found == kept | {changed}
    (text,) = [r.getMessage() for r in caplog.records if "any more" in r.getMessage()]
    assert text.endswith(f"hold them:\n  - {changed}")
    assert not differing(
        weights(lightning_peft.load_from_checkpoint(Guided, path)), weights(module)
    )


@torch.no_grad()
def test_what_the_files_do_not_hold_is_in_the_checkpoint(files, tmp_path) -> None:
    module = Guided(files)
    # As from a stage of training before; less than bfloat16 has digits for.
    tuned = "encoder.encoder.layer.0.output.dense.weight"
    module.get_parameter(tuned).mul_(1 + 1e-6)
    layer = module.encoder.encoder.layer[0].attention.self
    layer.key.weight.copy_(layer.query.weight)
    module.encoder.embeddings.train()
    other = {n for n in all_of(module, "encoder") if ".embeddings." in n or ".key.weight" in n}
    assert noted(module) == all_of(module, "encoder") - {tuned} - other


@torch.no_grad()
def test_which_files_of_a_model_count(files, tmp_path) -> None:
    module = Guided(files)
    module.encoder.save_pretrained(tmp_path)
    module = Guided(str(tmp_path))
    module.get_parameter(WORDS).add_(1)
    module.encoder.save_pretrained(tmp_path / "checkpoint-1")
    # With a head, under names with a prefix.
    model = BertForMaskedLM(module.encoder.config)
    model.bert.load_state_dict(module.encoder.state_dict())
    assert noted(module) == all_of(module, "encoder") - {WORDS}
    # The folder of a pipeline of diffusers.
    (tmp_path / "model_index.json").write_text("{}")
    assert noted(module) == all_of(module, "encoder")
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    model.save_pretrained(tmp_path)
    assert noted(Guided(str(tmp_path))) == all_of(module, "encoder")


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float16", "32-true"), ("bfloat16", "32-true"), ("float32", "bf16-true")],
)
def test_other_dtypes_of_the_same_file_are_left_out_too(dtype, precision, files, tmp_path) -> None:
    module = Guided(files, dtype)
    path, found = fit(tmp_path, module, precision=precision, max_steps=1)
    assert found == all_of(module, "teacher")
    loaded = lightning_peft.load_from_checkpoint(Guided, path)
    assert loaded.get_parameter(WORDS).dtype is getattr(torch, dtype)


@torch.no_grad()
@pytest.mark.parametrize(("loaded", "cast"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_weight_that_is_cast_and_then_changed_is_in_the_file(loaded, cast, files) -> None:
    module = Guided(files, loaded)
    expected = noted(module)
    assert expected == all_of(module, "encoder")
    module.encoder.to(getattr(torch, cast))
    assert {*engine.excluded_weights(module)} == expected
    # A step of the dtype that it has now.
    module.get_parameter(WORDS)[3, 2] *= 1 + 2 * torch.finfo(getattr(torch, cast)).eps
    assert {*engine.excluded_weights(module)} == expected - {WORDS}


def test_other_frozen_weights_are_refused(files, tmp_path) -> None:
    module = Guided(files)
    path, _ = fit(tmp_path, module, ["teacher", "encoder"], max_steps=1)
    message = r"leaves out frozen weights that the module loads itself.*\n  - {}\n"
    with pytest.raises(BaseMismatchError, match=message.format(r"teacher\.weight")):
        # Less than bfloat16 has digits for.
        lightning_peft.load_from_checkpoint(Guided, path, scale=1 + 1e-6)
    bert(16).save_pretrained(tmp_path / "other")
    other = Guided(str(tmp_path / "other"))
    run = trainer(tmp_path, "lora", ROOTS[0])
    with pytest.raises(BaseMismatchError, match=message.format("encoder.embeddings.*")):
        run.fit(other, data(), ckpt_path=path)
    # Also where they changed in this process.
    with torch.no_grad():
        module.teacher.weight.add_(1)
    here = message.format(r"teacher\.weight") + "They changed in this process"
    with pytest.raises(BaseMismatchError, match=here):
        run.validate(module, data(), ckpt_path=path)


def test_what_trained_since_is_read_from_its_file_again(files, tmp_path) -> None:
    module = Guided(files)
    path, _ = fit(tmp_path, module, max_steps=1)
    saved = weights(module)
    module.encoder.requires_grad_(True)
    for param in module.encoder.parameters():
        param.data.add_(1)
    trainer(tmp_path, "lora", ROOTS[0]).validate(module, data(), ckpt_path=path, verbose=False)
    assert not differing(weights(module), saved)


def test_what_a_checkpoint_had_others_for_is_in_the_next_one(files, tmp_path, caplog) -> None:
    path, found = fit(tmp_path, Guided(files, scale=2.0), [], max_steps=1)
    assert found >= all_of(Guided(files), "teacher")
    loaded = lightning_peft.load_from_checkpoint(Guided, path, scale=1.0)
    _, found = fit(tmp_path, loaded, "teacher", max_steps=1)
    # The bias is the same.
    assert found == all_of(loaded, "encoder") | {"teacher.weight"}
    assert "any more" in caplog.text
    again = lightning_peft.load_from_checkpoint(Guided, path, scale=1.0)
    assert not differing(weights(again), weights(loaded))


class Deleting(Guided):
    """Takes a part out of its checkpoints, and puts it back."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in self.encoder.state_dict():
            del checkpoint["state_dict"][f"encoder.{name}"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        checkpoint["state_dict"].update(own)


class Renaming(Guided):
    """Has other names in its checkpoints, and reads a part whose names are the same."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        moved = {n.replace("encoder.encoder", "layers"): v for n, v in state.items()}
        checkpoint["state_dict"] = moved

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        assert state[WORDS].shape == self.get_parameter(WORDS).shape
        for name in all_of(self, "encoder"):
            if name.startswith("encoder.encoder"):
                state[name] = state.pop(name.replace("encoder.encoder", "layers"))


class Scaling(Guided):
    """Has other values in its checkpoints, and puts others in when it is loaded."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][WORDS] = 2 * checkpoint["state_dict"][WORDS]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][BIAS] = checkpoint["state_dict"][BIAS] + 1


@pytest.mark.parametrize("kind", [Deleting, Renaming, Scaling])
def test_hooks_see_all_and_what_they_do_counts(kind, files, tmp_path) -> None:
    module = kind(files)
    path, found = fit(tmp_path, module, max_steps=1)
    assert found == all_of(module, "teacher") | ({WORDS} if kind is Scaling else set())
    expected = weights(module)
    if kind is Scaling:
        expected[WORDS] = 2 * expected[WORDS]
        expected[BIAS] = torch.ones(16)
    fresh = kind(files)
    trainer(tmp_path, "lora", ROOTS[0]).validate(fresh, data(), ckpt_path=path, verbose=False)
    for loaded in (fresh, lightning_peft.load_from_checkpoint(kind, path)):
        assert not differing(weights(loaded), expected)


class Late(Guided):
    """Loads its encoder where a checkpoint is loaded."""

    files = ""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        loaded = BertModel.from_pretrained(self.files, add_pooling_layer=False)
        self.encoder.load_state_dict(loaded.state_dict())


def test_a_module_may_load_its_weights_with_the_checkpoint(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Late, "files", files)
    bert(16).save_pretrained(tmp_path)
    module = Late(files)
    path, found = fit(tmp_path, module, max_steps=1)
    assert found == all_of(module, "teacher")
    fresh = Late(str(tmp_path))
    trainer(tmp_path, "lora", ROOTS[0]).validate(fresh, data(), ckpt_path=path, verbose=False)
    for loaded in (fresh, lightning_peft.load_from_checkpoint(Late, path, folder=str(tmp_path))):
        assert not differing(weights(loaded), weights(module))


def test_a_file_that_holds_all_of_it_is_continued_with_its_values(files, tmp_path) -> None:
    module = Guided(files)
    with torch.no_grad():
        module.get_parameter(WORDS).add_(1)
    path, found = fit(tmp_path, module, [], max_steps=2)
    assert found == all_of(module, "teacher", "encoder")
    fresh = Guided(files)
    run = trainer(tmp_path, "lora", ROOTS[0], max_steps=4)
    run.fit(fresh, data(), ckpt_path=path)
    assert torch.equal(fresh.get_parameter(WORDS), module.get_parameter(WORDS))
    run.save_checkpoint(path)
    assert held(path) == all_of(module, "teacher") | {WORDS}


def test_names_that_do_not_fit_are_refused(files, tmp_path) -> None:
    names = ["techer", "student", "proj"]
    with pytest.raises(ConfigError) as info:
        fit(tmp_path, Guided(files), names)
    text = str(info.value)
    assert "'techer' is not a submodule of Guided; near names: teacher" in text
    assert re.search(r"'student': \d+ of its tensors train, .* 'student\..*lora_A", text)
    assert "'proj': 2 of its tensors train" in text
    assert "requires_grad_(False)" in text


def test_the_rest_of_a_model_of_which_a_part_is_adapted(files, tmp_path) -> None:
    module = Guided(files)
    parts = ["encoder.encoder.layer.0.attention", "student"]
    ours = strategy("lora", ROOTS[0], adapt=parts, verify="off")
    path, found = fit(tmp_path, module, method=ours, max_steps=1)
    # Heads of adapted parts are in every file.
    head = {f"{parts[0]}.output.dense.{leaf}" for leaf in ("weight", "bias")}
    assert {n for n in found if "lora_" not in n} == all_of(module, "teacher") | head
    loaded = lightning_peft.load_from_checkpoint(Guided, path)
    assert not differing(weights(loaded), weights(module))


def test_fabric(files, tmp_path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    module, path = Guided(files), tmp_path / "fabric.ckpt"
    lightning_peft.inject(module, r=2)
    lightning_peft.save_fabric_checkpoint(fabric, path, fabric.setup(module))
    assert held(path) == all_of(module, "teacher")
    module = Guided(files)
    made = lightning_peft.inject(module, r=2, exclude_from_checkpoint="teacher")
    assert made.excluded == {"teacher": 1088}
    lightning_peft.save_fabric_checkpoint(fabric, path, module)
    assert held(path) == all_of(module, "encoder")
    other = Guided(files, scale=2.0)
    lightning_peft.inject(other, r=2)
    with pytest.raises(BaseMismatchError, match=r"teacher\.weight"):
        lightning_peft.load_fabric_checkpoint(fabric, path, other)
    fresh = Guided(files)
    lightning_peft.inject(fresh, r=2)
    lightning_peft.load_fabric_checkpoint(fabric, path, fresh)
    assert not differing(weights(fresh), weights(module))
