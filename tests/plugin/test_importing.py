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
from lightning_peft.plugin.importing import _mapped_state, import_checkpoint

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


def test_keys_that_are_relative_to_a_submodule(old, tmp_path):
    torch.save(old[2], tmp_path / "adapters.ckpt")
    where = (tmp_path / "adapters.ckpt", f"{__name__}:Net", tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match=r"base_model.model.first.lora_A.weight"):
        import_checkpoint(*where, lora_alpha=ALPHA)
    assert import_checkpoint(*where, lora_alpha=ALPHA, adapt="trunk").loaded.adapters == 2
    module = lightning_peft.load_from_checkpoint(Net, tmp_path / "new.ckpt")
    adapters = [p for name, p in module.named_parameters() if "lora_" in name]
    old_ones = [value for name, value in old[2].items() if "lora_" in name]
    assert all(map(torch.equal, adapters, old_ones))
    assert len(adapters) == 4


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


class Towers(pl.LightningModule):
    """Two small towers; ``order`` is that of their definition, ``taken`` that of the optimizer."""

    def __init__(self, order="ab", taken="ab", lora_alpha=ALPHA, use_rslora=False):
        super().__init__()
        self.save_hyperparameters()
        self.taken = taken
        for name in order:
            with torch.random.fork_rng():
                torch.manual_seed(ord(name))
                setattr(self, name, nn.Sequential(nn.Linear(6, 6)))

    def forward(self, x):
        return self.a(x).sum(1) * 2 + self.b(x).sum(1) ** 2

    def configure_optimizers(self):
        params = [p for name in self.taken for p in getattr(self, name).parameters()]
        return torch.optim.AdamW([p for p in params if p.requires_grad], lr=0.1)


class WrappedTowers(Towers):
    def __init__(self, order="ab", taken="ab", lora_alpha=ALPHA, use_rslora=False):
        super().__init__(order, taken, lora_alpha, use_rslora)
        for name in "ab":
            config = peft.LoraConfig(
                r=4, lora_alpha=lora_alpha, use_rslora=use_rslora, target_modules=["0"]
            )
            setattr(self, name, peft.get_peft_model(getattr(self, name), config))


def trained(folder: Path, **given) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    """A checkpoint of wrapped towers after two steps, the module and its optimizer."""
    torch.manual_seed(4)
    module = WrappedTowers(**given)
    optimizer = module.configure_optimizers()
    for _ in range(2):
        optimizer.zero_grad()
        module(loader().dataset.tensors[0]).sum().backward()
        optimizer.step()
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save({**content, "optimizer_states": [optimizer.state_dict()]}, folder / "old.ckpt")
    return folder / "old.ckpt", module, optimizer


@pytest.mark.parametrize(
    ("given", "changed", "certain"),
    [
        ({}, {}, True),
        ({}, {"order": "ba", "taken": "ba"}, False),
        ({"taken": "ba"}, {}, False),
    ],
)
def test_moments_come_over_where_their_order_is_certain(given, changed, certain, tmp_path):
    source, module, optimizer = trained(tmp_path, **given)
    new = tmp_path / "new.ckpt"
    result = import_checkpoint(source, f"{__name__}:Towers", new, arguments=changed)
    x = loader().dataset.tensors[0]
    again = lightning_peft.load_from_checkpoint(Towers, new, **changed)
    torch.testing.assert_close(again(x), module(x))
    content = torch.load(new, weights_only=True)
    if not certain:
        assert "left out: the file does not say in which order its optimizer" in result.optimizer
        assert "optimizer_states" not in content
        return
    assert result.optimizer == "restored"
    ours = again.configure_optimizers()
    ours.load_state_dict(content["optimizer_states"][0])
    names = {id(p): name for name, p in again.named_parameters()}
    found = {names[id(p)]: state["exp_avg"] for p, state in ours.state.items()}
    for name, param in module.named_parameters():
        if param in optimizer.state:
            moment = found.pop(name.replace("base_model.model.", ""))
            assert torch.equal(moment, optimizer.state[param]["exp_avg"])
    assert not found


def test_shapes_decide_where_orders_differ(tmp_path):
    """One tensor of each shape is in another order now."""
    param = {name: torch.nn.Parameter(torch.ones(n)) for n, name in enumerate("abc", 1)}
    live = {id(value): name for name, value in param.items()}
    states = {n: {"exp_avg": torch.full((n + 1,), float(n))} for n in range(3)}
    old = {"state": states, "param_groups": [{"lr": 0.5, "params": [0, 1, 2]}]}
    optimizer = torch.optim.AdamW([param["c"], param["b"], param["a"]])
    mapped = _mapped_state(old, optimizer, ["a", "b", "c"], live)
    assert mapped["state"] == {0: states[2], 1: states[1], 2: states[0]}
    assert mapped["param_groups"] == [{"lr": 0.5, "params": [0, 1, 2]}]
    # The other way round: the old optimizer had the order of the one of now.
    turned = {"state": {n: states[2 - n] for n in range(3)}, "param_groups": old["param_groups"]}
    assert _mapped_state(turned, optimizer, ["a", "b", "c"], live)["state"] == turned["state"]
    assert "state 0 in the file is not that" in _mapped_state(old, optimizer, ["b", "a", "c"], live)


def test_the_scale_of_the_file_and_that_of_the_module(tmp_path):
    source, module, _ = trained(tmp_path, use_rslora=True)
    where = (source, f"{__name__}:Towers", tmp_path / "new.ckpt")
    import_checkpoint(*where)
    x = loader().dataset.tensors[0]
    again = lightning_peft.load_from_checkpoint(Towers, where[2])
    torch.testing.assert_close(again(x), module(x))
    itself = (source, f"{__name__}:WrappedTowers", tmp_path / "wrapped.ckpt")
    with pytest.raises(CheckpointError, match=f"lora_alpha=3 is given, the module has {ALPHA}"):
        import_checkpoint(*itself, lora_alpha=3)
    with pytest.raises(CheckpointError, match="use_rslora is given, the module has lora_alpha / r"):
        import_checkpoint(*itself, arguments={"use_rslora": False}, use_rslora=True)
    assert not itself[2].exists()
    import_checkpoint(*itself, lora_alpha={"a": ALPHA}, use_rslora=True)
    again = lightning_peft.load_from_checkpoint(WrappedTowers, itself[2])
    torch.testing.assert_close(again(x), module(x))


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
                       (f"{__name__}:Trunk", "not a LightningModule"),
                       (f"{__name__}:refusals", "refusals is not a LightningModule"),
                       ("lightning_peft.tasks:CausalLM", "cannot be built.*--init")):  # fmt: skip
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
