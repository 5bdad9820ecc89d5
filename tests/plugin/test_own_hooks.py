"""Modules whose hooks leave keys out of checkpoints: adapters stay in, the base stays out."""

from __future__ import annotations

import pytest
import torch
from modules import (
    ROOTS,
    differing,
    lightning,
    loader,
    outputs,
    strategy,
    task,
    task_class,
    trainer,
    weights,
)
from safetensors.torch import load_file

import lightning_peft
from lightning_peft import LoRACallback, engine
from lightning_peft.errors import CheckpointError
from lightning_peft.plugin.namespace import bind_to_lightning

Task = task_class(ROOTS[0])
PRETRAINED = "model.layers."


class OwnStateDict(Task):
    """The way that Lightning documents."""

    def __init__(self, kind="linears"):
        super().__init__(kind)
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith(PRETRAINED)}


class NothingAtAll(Task):
    """Leaves out the head and the statistics of the batch norm too."""

    def state_dict(self, *args, **kwargs):
        return {}

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict({}, strict=False)


class OwnStateOfAPart(Task):
    def build(self):
        super().build()
        self.model.layers.state_dict = lambda *args, **kwargs: {}


class PostHook(Task):
    def build(self):
        super().build()
        self.model.register_state_dict_post_hook(self.leave_out)

    @staticmethod
    def leave_out(module, state, prefix, local_metadata):
        for name in [name for name in state if name.startswith(PRETRAINED)]:
            del state[name]


class DropsPrefix(Task):
    """Files have the names of the model, as others want them."""

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name.removeprefix("model."): value for name, value in state.items()}

    def load_state_dict(self, state, strict=True, assign=False):
        state = {f"model.{name.removeprefix('model.')}": value for name, value in state.items()}
        return super().load_state_dict(state, strict, assign)


class DropsOnSave(OwnStateDict):
    state_dict = Task.state_dict

    def on_save_checkpoint(self, checkpoint):
        for name in [n for n in checkpoint["state_dict"] if n.startswith("model.")]:
            del checkpoint["state_dict"][name]


class DropsOnLoad(Task):
    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in state.items() if not n.startswith(PRETRAINED)}


class Renames(Task):
    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"network/{name}": value for name, value in state.items()}

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name[len("network/") :]: v for name, v in state.items()}


class SavesEverything(Task):
    """Puts the base back into the file."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = self.state_dict()


KINDS = [
    OwnStateDict,
    NothingAtAll,
    OwnStateOfAPart,
    PostHook,
    DropsPrefix,
    DropsOnSave,
    DropsOnLoad,
    Renames,
    SavesEverything,
]


class Dropping(lightning(ROOTS[0]).Callback):
    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["state_dict"].clear()


def trained(cls, folder, method="lora", kind="linears", **given):
    """Trains for one epoch, and saves a whole file and one of weights only."""
    module = cls(kind)
    run = trainer(folder, method, enable_checkpointing=False, **given)
    run.fit(module, loader(kind))
    for name in ("whole", "weights"):
        run.save_checkpoint(folder / f"{name}.ckpt", weights_only=name == "weights")
    assert any(value.abs().sum() > 0 for name, value in weights(module).items() if "lora_B" in name)
    return module


def assert_validated(cls, module, file, method="lora", kind="linears", **given):
    found = cls(kind)
    run = trainer(file.parent, method, enable_checkpointing=False, **given)
    run.validate(found, loader(kind), ckpt_path=file, verbose=False)
    assert not differing(weights(found), weights(module))


def assert_loaded(cls, module, file, kind="linears"):
    loaded = lightning_peft.load_from_checkpoint(cls, file)
    assert torch.equal(outputs(loaded, kind), outputs(module, kind))


def assert_resumed(cls, module, file, method="lora", kind="linears", **given):
    resumed = cls(kind)
    run = trainer(file.parent, method, enable_checkpointing=False, **given)
    run.fit(resumed, loader(kind), ckpt_path=file)
    assert run.global_step == 6
    assert not resumed.losses
    assert not differing(weights(resumed), weights(module))


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_no_adapter_is_lost(cls, tmp_path):
    method = "qlora" if KINDS.index(cls) % 2 else "lora"
    module = trained(cls, tmp_path, method)
    file = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    base = {"model.layers.0.weight", "model.layers.1.weight", "model.layers.0.bias"}
    large = [n for n, v in file["state_dict"].items() if isinstance(v, torch.Tensor) and v.numel()]
    assert not [name for name in large if any(name.endswith(end[6:]) for end in base)]
    assert_validated(cls, module, tmp_path / "whole.ckpt", method)
    assert_loaded(cls, module, tmp_path / "weights.ckpt")
    if cls is OwnStateDict:
        assert_resumed(cls, module, tmp_path / "whole.ckpt", method)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "gpt2", "residuals"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("cls", [NothingAtAll, DropsPrefix, DropsOnSave, DropsOnLoad, Renames])
def test_no_adapter_is_lost_of_any_model(cls, method, kind, tmp_path):
    module = trained(cls, tmp_path, method, kind)
    for name in ("whole", "weights"):
        assert_validated(cls, module, tmp_path / f"{name}.ckpt", method, kind)
        assert_loaded(cls, module, tmp_path / f"{name}.ckpt", kind)
    assert_resumed(cls, module, tmp_path / "whole.ckpt", method, kind)


def test_neither_by_a_callback_nor_under_one(tmp_path):
    given = {
        "callbacks": [
            bind_to_lightning(LoRACallback, ROOTS[0])(r=4, announce=False),
            Dropping(),
        ]
    }
    module = trained(DropsOnSave, tmp_path, "auto", **given)
    given = {"callbacks": [bind_to_lightning(LoRACallback, ROOTS[0])(r=4, announce=False)]}
    assert_validated(DropsOnSave, module, tmp_path / "whole.ckpt", "auto", **given)


def test_values_that_a_hook_puts_in_are_loaded(tmp_path):
    """Averaged weights, for example, go into a file and come out of it."""

    class Doubles(Task):
        def on_save_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {
                name: 2 * value if "lora_B" in name else value for name, value in state.items()
            }
            checkpoint["mine"] = {"steps": self.global_step, "names": sorted(state)}

        def on_load_checkpoint(self, checkpoint):
            self.seen = (checkpoint["mine"], sorted(checkpoint["state_dict"]))

    module = trained(Doubles, tmp_path)
    loaded = lightning_peft.load_from_checkpoint(Doubles, tmp_path / "whole.ckpt")
    noted, names = loaded.seen
    assert noted == {"steps": 6, "names": names}
    frozen = engine.require_record(module).frozen
    assert any("lora_B" in name for name in names)
    assert frozen
    assert not frozen & set(names)
    for name, value in weights(module).items():
        assert torch.equal(weights(loaded)[name], 2 * value if "lora_B" in name else value)


class WithTeacher(Task):
    """Has a part that is not adapted, which hooks leave out."""

    def build(self):
        super().build()
        self.teacher = torch.nn.Linear(3, 3)

    def on_save_checkpoint(self, checkpoint):
        for name in ("teacher.weight", "teacher.bias"):
            del checkpoint["state_dict"][name]


def test_other_parts_may_be_left_out_where_the_module_says_so(tmp_path):
    class Lenient(WithTeacher):
        def __init__(self, kind="linears"):
            super().__init__(kind)
            self.strict_loading = False

    module = trained(Lenient, tmp_path, strategy(adapt=["model"]))
    file = tmp_path / "whole.ckpt"
    found = Lenient("linears")
    run = trainer(tmp_path, strategy(adapt=["model"]))
    run.validate(found, loader(), ckpt_path=file, verbose=False)
    assert set(differing(weights(found), weights(module))) == {"teacher.weight", "teacher.bias"}
    with pytest.raises(CheckpointError, match=r"missing: teacher\.weight"):
        trainer(tmp_path, strategy(adapt=["model"])).validate(
            WithTeacher("linears"), loader(), ckpt_path=file
        )


def test_a_hook_that_saves_the_adapted_model(tmp_path):
    module = task(kind="llama")
    module.on_train_epoch_end = lambda: module.model.save_pretrained(tmp_path / "mine")
    trainer(tmp_path, max_epochs=2).fit(module, loader("llama"))
    assert module.trainer.current_epoch == 2
    module.model.save_pretrained(tmp_path / "after")
    lightning_peft.save_adapter(module, tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "adapter_model.safetensors")
    for name in ("mine", "after"):
        assert not differing(load_file(tmp_path / name / "adapter_model.safetensors"), expected)
