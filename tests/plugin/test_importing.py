"""Checkpoints of PEFT inside of LightningModules, brought over by ``lightning-peft import``."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft
from lightning_peft.cli import main
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.plugin.importing import import_checkpoint

ALPHA = 12


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.second, self.extra = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(self.second(self.norm(self.first(x)).relu()).relu())


class Net(pl.LightningModule):
    """What a migrated code base has: no PEFT in it."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk, self.head = Trunk(), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.trunk(x))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Wrapped(Net):
    """The same with PEFT by hand."""

    def __init__(self, classes: int = 3, seed: int = 0) -> None:
        super().__init__(classes, seed)
        config = peft.LoraConfig(
            r=2, lora_alpha=ALPHA, target_modules=["first", "second"], modules_to_save=["extra"]
        )
        self.trunk = peft.get_peft_model(self.trunk, config)


def loader() -> DataLoader:
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(16, 6, generator=draw), torch.randint(3, (16,), generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def fit(module, steps=4, strategy="auto", **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, strategy=strategy,
        enable_checkpointing=False, **quiet,
    )  # fmt: skip
    trainer.fit(module, loader(), **options)
    return trainer


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A run with PEFT by hand: the module after 4 and 8 steps, and the file of step 4."""
    folder = tmp_path_factory.mktemp("old")
    torch.manual_seed(1)
    module = Wrapped()
    fit(module).save_checkpoint(folder / "four.ckpt")
    outputs = module.eval()(loader().dataset.tensors[0])
    peft_state = peft.get_peft_model_state_dict(module.trunk)
    module.trunk.save_pretrained(folder / "peft")
    continued = Wrapped()
    fit(continued, 8, ckpt_path=folder / "four.ckpt")
    return folder, outputs, peft_state, continued.eval()(loader().dataset.tensors[0])


@pytest.mark.parametrize("cls", [Net, Wrapped])
def test_a_full_checkpoint_comes_over_with_its_optimizer(old, tmp_path, cls):
    folder, outputs, _, _ = old
    new = tmp_path / "new.ckpt"
    alpha = ALPHA if cls is Net else None
    result = import_checkpoint(
        folder / "four.ckpt", f"{__name__}:{cls.__name__}", new, lora_alpha=alpha
    )
    assert (result.loaded.adapters, result.loaded.unmapped, result.optimizer) == (2, [], "restored")
    assert result.loaded.saved == ["trunk.extra" if cls is Net else result.loaded.saved[0]]
    module = lightning_peft.load_from_checkpoint(cls, new)
    torch.testing.assert_close(module(loader().dataset.tensors[0]), outputs)
    assert {p.name for p in result.adapter.iterdir()} >= {"adapter_model.safetensors"}


def test_the_run_continues_where_it_was(old, tmp_path):
    folder, _, _, continued = old
    new = tmp_path / "new.ckpt"
    import_checkpoint(folder / "four.ckpt", f"{__name__}:Net", new, lora_alpha=ALPHA)
    module = Net()
    strategy = lightning_peft.LoRAStrategy(
        r=2, lora_alpha=ALPHA, target_modules=["trunk.first", "trunk.second"],
        modules_to_save=["trunk.extra"], announce=False,
    )  # fmt: skip
    fit(module, 8, strategy, ckpt_path=new)
    torch.testing.assert_close(module.eval()(loader().dataset.tensors[0]), continued)


def test_adapters_saved_by_hand_need_their_scale(old, tmp_path):
    folder, outputs, state, _ = old
    full = torch.load(folder / "four.ckpt", weights_only=True)["state_dict"]
    rest = {
        k: v for k, v in full.items() if k.startswith("head.") or "running" in k or "batches" in k
    }
    by_hand = {f"trunk.{k}": v for k, v in state.items()} | rest
    torch.save(by_hand, tmp_path / "adapters.pt")
    where = (tmp_path / "adapters.pt", f"{__name__}:Net", tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match="scale of the adapters is not in the file"):
        import_checkpoint(*where)
    result = import_checkpoint(*where, lora_alpha=ALPHA)
    assert "trunk.first.weight" in result.loaded.absent
    assert result.optimizer == "not in the file"
    module = lightning_peft.load_from_checkpoint(Net, tmp_path / "new.ckpt")
    # `norm`'s weights are trained by no one: PEFT froze them.
    torch.testing.assert_close(module(loader().dataset.tensors[0]), outputs)


def test_a_base_other_than_the_constructors_is_kept_in_the_new_file(old, tmp_path):
    folder, outputs, _, _ = old
    new = tmp_path / "new.ckpt"
    result = import_checkpoint(
        folder / "four.ckpt", f"{__name__}:Net", new, arguments={"seed": 5}, lora_alpha=ALPHA
    )
    assert "trunk.first.weight" in result.loaded.base
    module = lightning_peft.load_from_checkpoint(Net, new, seed=5)
    torch.testing.assert_close(module(loader().dataset.tensors[0]), outputs)


class Pair(Net):
    """Two trunks; the head is not used, so it has no optimizer state."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.other = Trunk()

    def forward(self, x):
        return self.trunk(x) + self.other(x)


class WrappedPair(Pair):
    def __init__(self) -> None:
        super().__init__()
        names, ranks = ["first", "second"], {"second": 1}
        for part, alpha in (("trunk", ALPHA), ("other", 5)):
            config = peft.LoraConfig(
                r=2, lora_alpha=alpha, target_modules=names, rank_pattern=ranks
            )
            setattr(self, part, peft.get_peft_model(getattr(self, part), config))


def test_ranks_and_scales_by_layer_and_a_parameter_without_a_state(tmp_path):
    torch.manual_seed(6)
    module = WrappedPair()
    fit(module).save_checkpoint(tmp_path / "old.ckpt")
    content = torch.load(tmp_path / "old.ckpt", weights_only=True)
    # As DeepSpeed and DDP name them.
    content["state_dict"] = {f"_forward_module.{k}": v for k, v in content["state_dict"].items()}
    torch.save(content, tmp_path / "old.ckpt")
    where = (tmp_path / "old.ckpt", f"{__name__}:Pair", tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match=r"(?s)given for 'other', and not for:.*trunk\.first"):
        import_checkpoint(*where, lora_alpha={"other": 5})
    result = import_checkpoint(*where, lora_alpha={"other": 5, "trunk": ALPHA})
    assert result.optimizer == "restored"
    again = lightning_peft.load_from_checkpoint(Pair, where[2])
    x = loader().dataset.tensors[0]
    torch.testing.assert_close(again(x), module.eval()(x))
    written = torch.load(where[2], weights_only=True)["optimizer_states"][0]["state"]
    names = [name for name, _ in again.named_parameters()]
    theirs = content["optimizer_states"][0]["state"]
    assert len(written) == len(theirs) == 8
    found = {names[i]: state["exp_avg"] for i, state in written.items()}
    # In the old order: trunk, then other, each with its factors.
    old_names = [name for name, _ in module.named_parameters()]
    for index, state in theirs.items():
        name = old_names[index].replace("base_model.model.", "")
        assert torch.equal(found[name], state["exp_avg"])


def test_a_peft_folder(old, tmp_path):
    folder, _, state, _ = old
    where = (folder / "peft", f"{__name__}:Net", tmp_path / "new.ckpt")
    result = import_checkpoint(*where, adapt="trunk")
    assert (result.loaded.adapters, result.loaded.parts) == (2, ["trunk"])
    module = lightning_peft.load_from_checkpoint(Net, where[2])
    torch.testing.assert_close(
        module.trunk.first.lora_A["default"].weight, state["base_model.model.first.lora_A.weight"]
    )


def test_what_has_no_place_is_named(old, tmp_path):
    folder = old[0]
    content = torch.load(folder / "four.ckpt", weights_only=True)
    content["state_dict"]["teacher.weight"] = torch.ones(2)
    content["state_dict"]["head.weight"] = torch.ones(9, 8)
    torch.save(content, tmp_path / "odd.ckpt")
    where = (tmp_path / "odd.ckpt", f"{__name__}:Net", tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match=r"(?s)no place.*head\.weight.*teacher\.weight"):
        import_checkpoint(*where, lora_alpha=ALPHA)
    assert not where[2].exists()
    result = import_checkpoint(*where, lora_alpha=ALPHA, allow_unmapped=True)
    assert result.loaded.unmapped == ["head.weight", "teacher.weight"]
    assert "head.weight" in result.loaded.absent


class Touch:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def refusals(folder: Path, old_folder: Path):
    (folder / "zero" / "checkpoint").mkdir(parents=True)
    (folder / "zero" / "checkpoint" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    (folder / "fsdp").mkdir()
    (folder / "fsdp" / ".metadata").touch()
    (folder / "empty").mkdir()
    torch.save({"state_dict": {}, "x": Touch(str(folder / "ran"))}, folder / "code.ckpt")
    torch.save({"state_dict": {"head.weight": torch.ones(3, 8)}}, folder / "plain.ckpt")
    save_file({"a.lora_A.weight": torch.ones(1)}, folder / "other.safetensors")
    return {
        "zero": (CheckpointError, "convert_zero_checkpoint_to_fp32_state_dict"),
        "fsdp": (CheckpointError, "consolidate_checkpoint"),
        "empty": (CheckpointError, "neither a PEFT folder"),
        "code.ckpt": (CheckpointError, "cannot be read without running code"),
        "plain.ckpt": (CheckpointError, "holds no LoRA factors"),
        "other.safetensors": (CheckpointError, "holds no LoRA factors"),
        "absent.ckpt": (ConfigError, "there is no such checkpoint"),
    }


def test_what_is_refused_says_why_and_leaves_nothing(old, tmp_path):
    for name, (kind, text) in refusals(tmp_path, old[0]).items():
        with pytest.raises(kind, match=text):
            import_checkpoint(tmp_path / name, f"{__name__}:Net", tmp_path / "new.ckpt")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new.ckpt").exists()
    for path, text in (("nothing", "write package"), (f"{__name__}:Absent", "cannot be imported"),
                       (f"{__name__}:Trunk", "not a LightningModule")):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            import_checkpoint(old[0] / "four.ckpt", path, tmp_path / "new.ckpt")


def test_a_checkpoint_of_ours_and_an_output_that_is_there_are_refused(old, tmp_path):
    new = tmp_path / "new.ckpt"
    import_checkpoint(old[0] / "four.ckpt", f"{__name__}:Net", new, lora_alpha=ALPHA)
    with pytest.raises(ConfigError, match="is there already"):
        import_checkpoint(old[0] / "four.ckpt", f"{__name__}:Net", new, lora_alpha=ALPHA)
    with pytest.raises(CheckpointError, match="checkpoint of this package already"):
        import_checkpoint(new, f"{__name__}:Net", tmp_path / "newer.ckpt", lora_alpha=ALPHA)


def test_the_optimizer_is_left_out_where_it_does_not_fit(old, tmp_path):
    content = torch.load(old[0] / "four.ckpt", weights_only=True)
    content["optimizer_states"] *= 2
    torch.save(content, tmp_path / "two.ckpt")
    result = import_checkpoint(
        tmp_path / "two.ckpt", f"{__name__}:Net", tmp_path / "new.ckpt", lora_alpha=ALPHA
    )
    assert result.optimizer == "left out: 2 in the file, 1 in the module"


def test_the_command(old, tmp_path, capsys):
    words = ["import", str(old[0] / "four.ckpt"), "--module", f"{__name__}:Net"]
    words += ["--output", str(tmp_path / "new.ckpt"), "--lora-alpha", str(ALPHA)]
    assert main([*words, "--init", "classes"]) == 2
    assert main([*words, "--init", "classes=3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["adapters"], printed["optimizer"]) == (2, "restored")
    words[5] = str(tmp_path / "other.ckpt")
    assert main(words) == 0
    assert "adapters    on 2 layers" in capsys.readouterr().out
