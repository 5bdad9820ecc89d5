"""Folders that PEFT writes load here to the same output, and those written here load in PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_gpt2, tiny_llama, token_batch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import lightning_peft
from lightning_peft import engine
from lightning_peft.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    UnsupportedError,
)

from .reference import injected, output_of, randomize

WEIGHTS = "adapter_model.safetensors"


class Layered(nn.Module):
    """Two lists of blocks, of which ``layers_pattern`` chooses one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(5, 5)}) for _ in range(3))
        self.back = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(5, 5)}) for _ in range(3))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.front, *self.back]:
            x = torch.tanh(block["up"](x))
        return self.head(x)


class Gates(nn.Module):
    """A head whose name is the end of the name of other layers."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.mid_out, self.wide_mid_out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tail = nn.Module()
        self.tail.out = nn.Linear(4, 2)
        self.out = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide_mid_out(torch.relu(self.mid_out(x))))
        return self.out(self.tail.out(x))


def bert(kind: type = BertForSequenceClassification) -> nn.Module:
    settings = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_labels": 3}
    config = BertConfig(**settings, num_attention_heads=2, intermediate_size=16)
    return kind(config).eval()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))


@torch.no_grad()
def train(model: nn.Module) -> None:
    for param in model.parameters():
        if param.requires_grad:
            param.add_(torch.randn_like(param) * 0.1)


def words() -> dict[str, Tensor]:
    return {"input_ids": token_batch(rows=1)["input_ids"] % 40}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=2, **settings)


FOLDERS: dict[str, tuple[Callable[[], nn.Module], PeftConfig]] = {
    "classes of sequences": (bert, lora(task_type="SEQ_CLS", target_modules=["query"])),
    "classes of tokens": (
        lambda: bert(BertForTokenClassification),
        lora(task_type="TOKEN_CLS", target_modules=["query", "value"]),
    ),
    "embeddings": (tiny_llama, lora(target_modules=["embed_tokens", "q_proj"])),
    "output layer": (tiny_llama, lora(target_modules=["lm_head", "q_proj"])),
    "norms by their ending": (
        tiny_llama,
        lora(target_modules=["v_proj"], modules_to_save=["norm"]),
    ),
    "names that match nothing": (
        tiny_llama,
        lora(
            target_modules=["q_proj", "query"],
            exclude_modules=["layers.0.self_attn.q_proj", "absent"],
            modules_to_save=["absent", "lm_head"],
            rank_pattern={"absent": 3},
        ),
    ),
    "indices in a list": (
        Layered,
        lora(target_modules=["up"], layers_to_transform=[0, 2], layers_pattern="back"),
    ),
    "trainable module": (plain, lora(target_modules=["0"])),
    "all biases": (plain, lora(target_modules=["0"], bias="all")),
    "all biases and a head": (
        bert,
        lora(task_type="SEQ_CLS", target_modules=["query"], bias="all"),
    ),
    "all biases and a module of several layers": (
        bert,
        lora(target_modules=["query"], bias="all", modules_to_save=["pooler"]),
    ),
    "own biases": (plain, lora(target_modules=["0", "2"], bias="lora_only")),
    "ranks and scalings": (
        plain,
        lora(
            target_modules=["0", "2"],
            rank_pattern={"^0": 3},
            alpha_pattern={"2": 5},
            use_rslora=True,
        ),
    ),
    "DoRA": (plain, lora(target_modules=["0"], use_dora=True)),
    "DoRA on an embedding": (
        tiny_llama,
        lora(target_modules=["embed_tokens"], use_dora=True, modules_to_save=["lm_head"]),
    ),
    "tied weights": (
        lambda: tiny_llama(tied=True),
        lora(target_modules=["v_proj"], use_rslora=True),
    ),
    "transposed layers with all biases": (tiny_gpt2, lora(target_modules=["c_attn"], bias="all")),
    "a long name and an exclusion": (
        tiny_llama,
        lora(
            target_modules=["q_proj", "layers.1.mlp.up_proj"],
            exclude_modules=["0.self_attn.q_proj"],
        ),
    ),
    "regular expression": (tiny_llama, lora(target_modules=r".*layers\.1\..*(q|up)_proj")),
    "IA3 on the output layer": (
        tiny_llama,
        IA3Config(target_modules=["lm_head", "k_proj"], feedforward_modules=[]),
    ),
}


def inputs_for(model: nn.Module) -> Any:
    if hasattr(model, "config"):
        return words()
    return torch.randn(3, 5 if isinstance(model, Layered) else 4)


# A name decides keys of files, and those have four forms.
NAMED = ("trainable module", "all biases", "DoRA", "embeddings")


@pytest.mark.parametrize(
    ("case", "adapter_name"),
    [*((case, "default") for case in FOLDERS), *((case, "other") for case in NAMED)],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*rank_pattern keys")
def test_what_peft_writes_loads_here_and_goes_back(
    case: str, adapter_name: str, tmp_path: Path
) -> None:
    build, config = FOLDERS[case]
    base = build()
    x = inputs_for(base)
    theirs = get_peft_model(copy.deepcopy(base), copy.deepcopy(config), adapter_name).eval()
    train(theirs)
    expected = output_of(theirs, x)
    theirs.save_pretrained(tmp_path)
    mine = copy.deepcopy(base)
    lightning_peft.load_adapter(mine, tmp_path)
    torch.testing.assert_close(output_of(mine, x), expected, rtol=1e-5, atol=1e-6)
    with lightning_peft.disable_adapters(mine):
        assert torch.equal(output_of(mine, x), output_of(base, x))
    again = lightning_peft.save_adapter(mine, tmp_path / "again")
    back = PeftModel.from_pretrained(copy.deepcopy(base), again).eval()
    torch.testing.assert_close(output_of(back, x), expected, rtol=1e-5, atol=1e-6)
    second = copy.deepcopy(base)
    lightning_peft.load_adapter(second, again)
    assert torch.equal(output_of(second, x), output_of(mine, x))


def test_a_file_of_modules_saved_inside_of_others_is_refused(tmp_path: Path) -> None:
    class Rooms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rooms = nn.Linear(4, 4), nn.Module()
            self.rooms.inner_rooms, self.rooms.door = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rooms.door(self.rooms.inner_rooms(self.a(x)))

    base = Rooms()
    config = lora(target_modules=["a"], modules_to_save=["rooms"])
    theirs = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    train(theirs)
    theirs.save_pretrained(tmp_path)
    fresh = copy.deepcopy(base)
    with pytest.raises(CheckpointError, match=r"inside of others(.|\n)*- rooms\.inner_rooms"):
        lightning_peft.load_adapter(fresh, tmp_path)
    assert list(fresh.state_dict()) == list(base.state_dict())
    mine, x = copy.deepcopy(base), torch.randn(2, 4)
    lightning_peft.inject(mine, config)
    train(mine)
    lightning_peft.load_adapter(fresh, lightning_peft.save_adapter(mine, tmp_path / "mine"))
    assert torch.equal(fresh(x), mine(x))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_other_embeddings_in_a_folder_are_used_and_kept(tmp_path: Path) -> None:
    """As after a vocabulary was resized: new rows are random in every process."""
    base = tiny_llama()
    trained = copy.deepcopy(base)
    with torch.no_grad():
        trained.model.embed_tokens.weight[-3:] += 1
        trained.lm_head.weight[-3:] -= 1
    theirs = get_peft_model(trained, lora(target_modules=["embed_tokens", "q_proj"])).eval()
    train(theirs)
    x = token_batch(rows=2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    mine = copy.deepcopy(base)
    lightning_peft.load_adapter(mine, tmp_path)
    theirs_read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(output_of(mine, x), output_of(theirs_read, x), rtol=1e-5, atol=1e-6)
    again = lightning_peft.save_adapter(mine, tmp_path / "again")
    back = PeftModel.from_pretrained(copy.deepcopy(base), again).eval()
    torch.testing.assert_close(output_of(back, x), output_of(mine, x), rtol=1e-5, atol=1e-6)
    entry = engine.require_record(mine).parts[""]
    assert "model.embed_tokens.weight" in entry.replaced
    assert "model.embed_tokens.weight" in engine.trainable_state_dict(mine)
    assert "model.embed_tokens.weight" not in entry.frozen
    # What a checkpoint says restores the module, though the base at hand is another one.
    restored = copy.deepcopy(base)
    engine.inject_as_described(restored, engine.describe(mine))
    engine.load_trainable_state_dict(restored, engine.trainable_state_dict(mine))
    assert torch.equal(output_of(restored, x), output_of(mine, x))
    fresh = injected(copy.deepcopy(base), target_modules=["k_proj"], adapter_name="first")
    with pytest.raises(CheckpointError, match="the file brings other values of the base"):
        lightning_peft.load_adapter(fresh, tmp_path, adapter_name="second")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_vocabulary_of_another_size_is_named(tmp_path: Path) -> None:
    base = tiny_llama()
    size = base.config.vocab_size
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(size + 2)
    theirs = get_peft_model(larger, lora(target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path)
    message = rf"vocabulary of {size + 2}, and this one has {size}: call model.resize_token"
    with pytest.raises(CheckpointError, match=message):
        lightning_peft.load_adapter(copy.deepcopy(base), tmp_path)
    base.resize_token_embeddings(size + 2)
    lightning_peft.load_adapter(base, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_single_tokens_that_peft_trained(tied: bool, tmp_path: Path) -> None:
    base = tiny_llama(tied=tied)
    config = lora(target_modules=["q_proj"], trainable_token_indices=[7, 3])
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    train(theirs)
    x = {"input_ids": torch.tensor([[1, 3, 7, 5]])}
    theirs.save_pretrained(tmp_path)
    mine = copy.deepcopy(base)
    lightning_peft.load_adapter(mine, tmp_path)
    torch.testing.assert_close(output_of(mine, x), output_of(theirs, x), rtol=1e-5, atol=1e-6)
    with lightning_peft.disable_adapters(mine):
        assert torch.equal(output_of(mine, x), output_of(base, x))
    again = lightning_peft.save_adapter(mine, tmp_path / "again")
    back = PeftModel.from_pretrained(copy.deepcopy(base), again).eval()
    torch.testing.assert_close(output_of(back, x), output_of(mine, x), rtol=1e-5, atol=1e-6)


def test_tokens_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    base = tiny_llama()
    size = base.config.vocab_size
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(size + 4)
    config = lora(target_modules=["q_proj"], trainable_token_indices=[2, size + 1])
    get_peft_model(larger, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"tokens \[{size + 1}\] of a vocabulary of {size}"):
        lightning_peft.load_adapter(base, tmp_path)


def test_adapters_in_sub_folders_are_found_by_name(tmp_path: Path) -> None:
    base, x = plain(), torch.randn(3, 4)
    theirs = get_peft_model(copy.deepcopy(base), lora(target_modules=["0"]), "first")
    theirs.add_adapter("second", lora(target_modules=["2"]))
    for name in ("first", "second"):
        theirs.set_adapter(name)
        train(theirs)
    theirs.save_pretrained(tmp_path)
    for name in ("first", "second"):
        mine = copy.deepcopy(base)
        lightning_peft.load_adapter(mine, tmp_path, adapter_name=name)
        theirs.set_adapter(name)
        torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="holds several adapters, 'first', 'second': name"):
        lightning_peft.load_adapter(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_a_weighted_sum_of_adapters(kind: str, tmp_path: Path) -> None:
    base, x = plain(), torch.randn(3, 4)
    theirs = get_peft_model(copy.deepcopy(base), lora(target_modules=["0", "2"]), "one")
    theirs.add_adapter("two", lora(target_modules=["0", "2"], lora_alpha=3))
    for name in ("one", "two"):
        theirs.set_adapter(name)
        train(theirs)
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", combination_type=kind)
    theirs.set_adapter("sum")
    theirs.save_pretrained(tmp_path, selected_adapters=["sum"])
    mine = copy.deepcopy(base)
    lightning_peft.load_adapter(mine, tmp_path)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_another_adapter_takes_the_place_of_one_of_its_size(tmp_path: Path) -> None:
    base, x = plain(), torch.randn(3, 4)
    expected = {}
    for name, rank in (("a", 2), ("b", 2), ("c", 3)):
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, target_modules=["0"]))
        train(theirs)
        theirs.save_pretrained(tmp_path / name)
        expected[name] = theirs(x)
    mine = copy.deepcopy(base)
    for name in ("a", "b"):
        lightning_peft.load_adapter(mine, tmp_path / name)
        torch.testing.assert_close(mine(x), expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="r=3 in the file and 2 in the module"):
        lightning_peft.load_adapter(mine, tmp_path / "c")
    torch.testing.assert_close(mine(x), expected["b"], rtol=1e-5, atol=1e-6)


def test_a_second_adapter_with_modules_of_its_own_changes_nothing(tmp_path: Path) -> None:
    base, x = plain(), torch.randn(3, 4)
    for name, saved in (("a", "2"), ("b", "4")):
        theirs = get_peft_model(
            copy.deepcopy(base), lora(target_modules=["0"], modules_to_save=[saved])
        )
        train(theirs)
        theirs.save_pretrained(tmp_path / name)
    lightning_peft.load_adapter(base, tmp_path / "a", adapter_name="a")
    before = base(x)
    with pytest.raises(UnsupportedError, match="supported for the only adapter of a part"):
        lightning_peft.load_adapter(base, tmp_path / "b", adapter_name="b")
    assert torch.equal(base(x), before)
    assert engine.require_record(base).adapter_names == ["a"]


def test_codes_are_not_taken_for_numbers(tmp_path: Path) -> None:
    base = plain()
    get_peft_model(copy.deepcopy(base), lora(target_modules=["0"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(
        {key: (value * 9).to(torch.int8) for key, value in tensors.items()}, tmp_path / WEIGHTS
    )
    with pytest.raises(CheckpointError, match="lora_A.weight: int8 in the file, float32 in"):
        lightning_peft.load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "_orig_mod.base_model.model."),
        ("base_model.model.", "base_model.model._fsdp_wrapped_module."),
        ("layers.0.", "layers.0._checkpoint_wrapped_module."),
        # A state dict with the adapter's name in it.
        (".weight", ".default.weight"),
    ],
)
def test_names_of_what_wrapped_the_model_in_training(
    before: str, after: str, tmp_path: Path
) -> None:
    """PEFT warns of missing keys in such folders, and goes on with a fresh adapter."""
    other = tiny_llama().eval()
    model = injected(copy.deepcopy(other), r=2)
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path)
    (tmp_path / "provenance.json").unlink()
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k.replace(before, after): v for k, v in tensors.items()}, tmp_path / WEIGHTS)
    lightning_peft.load_adapter(other, tmp_path)
    batch = words()
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_layers_that_transformers_has_moved_since(tmp_path: Path) -> None:
    """Adapters of models of text and images from before the language part had a name of its own.

    PEFT warns of missing keys and goes on with a fresh adapter.
    """
    sizes = {"hidden_size": 32, "vocab_size": 40, "intermediate_size": 16, "num_hidden_layers": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    other = Qwen2VLForConditionalGeneration(config).eval()
    model = injected(
        copy.deepcopy(other),
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["norm"],
        trainable_token_indices={"embed_tokens": [1, 2]},
    )
    randomize(model)
    model.model.language_model.norm.weight.data *= 2
    lightning_peft.save_adapter(model, tmp_path)
    (tmp_path / "provenance.json").unlink()
    tensors = load_file(tmp_path / WEIGHTS)
    old = {k.replace("model.language_model.", "model."): v for k, v in tensors.items()}
    assert not old.keys() & tensors.keys()
    save_file(old, tmp_path / WEIGHTS)
    lightning_peft.load_adapter(other, tmp_path)
    batch = words()
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_a_layer_of_the_name_that_peft_gives_to_wrapped_ones(tmp_path: Path) -> None:
    """Its adapter was left out, and one on a layer next to it with the shorter name was not."""

    def built() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleDict({"base_layer": nn.Linear(4, 4)}))

    model = injected(built(), r=2, target_modules=["0.base_layer"])
    randomize(model)
    lightning_peft.save_adapter(model, tmp_path)
    other = built()
    lightning_peft.load_adapter(other, tmp_path)
    layers = [one[0]["base_layer"] for one in (model, other)]
    assert torch.equal(layers[1](torch.ones(1, 4)), layers[0](torch.ones(1, 4)))


# --- heads of several adapters --------------------------------------------------------------------


@pytest.mark.parametrize("active", ["a", "b"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_each_folder_holds_its_own_adapter(name: str, active: str, tmp_path: Path) -> None:
    """The last layer is the head of one adapter and a target of the other."""
    base, x = plain().requires_grad_(False), torch.randn(3, 4)
    module = injected(copy.deepcopy(base), r=2, target_modules=["0"], adapter_name="a")
    lightning_peft.inject(module, r=2, target_modules=["2", "4"], adapter_name="b")
    randomize(module)
    lightning_peft.set_adapter(module, active)
    lightning_peft.save_adapter(module, tmp_path, adapter_name=name)
    layers = {"a": ["0"], "b": ["2", "4"]}[name]
    keys = {f"base_model.model.{n}.lora_{side}.weight" for n in layers for side in "AB"}
    assert load_file(tmp_path / WEIGHTS).keys() == keys
    lightning_peft.set_adapter(module, name)
    other = copy.deepcopy(base)
    lightning_peft.load_adapter(other, tmp_path)
    assert torch.equal(other(x), module(x))
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(theirs(x), module(x), rtol=1e-5, atol=1e-6)


def test_no_adapter_on_a_head_that_another_one_trains() -> None:
    module = injected(plain(), target_modules=["0"], adapter_name="a")
    with pytest.raises(UnsupportedError, match="4 of Sequential belongs to a head that is trained"):
        lightning_peft.inject(module, target_modules=["2", "4"], adapter_name="b")
    assert engine.require_record(module).adapter_names == ["a"]
    module[4].requires_grad_(False)
    lightning_peft.inject(module, target_modules=["2", "4"], adapter_name="b")


def test_a_head_that_was_trained_and_frozen_is_in_the_folder(tmp_path: Path) -> None:
    module = injected(plain(), target_modules=["0"])
    train(module)
    module[4].requires_grad_(False)
    lightning_peft.save_adapter(module, tmp_path)
    assert "base_model.model.4.weight" in load_file(tmp_path / WEIGHTS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["4"]


# --- names of heads -------------------------------------------------------------------------------


def test_the_end_of_another_name_is_not_written_as_a_head(tmp_path: Path) -> None:
    base, x = Gates(), torch.randn(3, 4)
    for saved in (["tail.out"], ["tail.out", "out"], ["out"]):
        module = copy.deepcopy(base).requires_grad_(False)
        lightning_peft.inject(
            module, r=2, target_modules=["mid_out", "wide_mid_out"], modules_to_save=saved
        )
        train(module)
        lightning_peft.save_adapter(module, tmp_path)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(theirs(x), module(x), rtol=1e-5, atol=1e-6)
        mine = copy.deepcopy(base)
        lightning_peft.load_adapter(mine, tmp_path)
        assert torch.equal(mine(x), module(x))
        (tmp_path / "provenance.json").unlink()
        mine = copy.deepcopy(base)
        lightning_peft.load_adapter(mine, tmp_path)
        assert torch.equal(mine(x), module(x))


def test_a_layer_under_two_names_is_said_when_saving(tmp_path: Path) -> None:
    module = plain()
    module.again = module[2]
    lightning_peft.inject(module, target_modules=["2"])
    with pytest.warns(UserWarning, match="2 is also called again, and PEFT would replace it under"):
        lightning_peft.save_adapter(module, tmp_path)


@pytest.mark.parametrize("value", ["norm", ["head", ""], [3]])
def test_modules_to_save_is_a_list_of_names(value: Any) -> None:
    with pytest.raises(ConfigError, match="a list of names of submodules"):
        lightning_peft.inject(plain(), LoraConfig(target_modules=["0"], modules_to_save=value))


# --- the base -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_every_frozen_layer_belongs_to_the_base(layer: int, tmp_path: Path) -> None:
    base = plain().requires_grad_(False)
    module = injected(copy.deepcopy(base), r=2, target_modules=["0"])
    lightning_peft.save_adapter(module, tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other[layer].weight[0, 0] += 1
    with pytest.raises(BaseMismatchError, match="was trained on another base"):
        lightning_peft.load_adapter(other, tmp_path)
    lightning_peft.load_adapter(base, tmp_path)


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")])
def test_adapters_of_one_base_share_it_whatever_their_targets(
    order: tuple[str, ...], tmp_path: Path
) -> None:
    base = plain().requires_grad_(False)
    for name, targets in {"a": ["0"], "b": ["4"], "c": ["2", "4"]}.items():
        module = injected(copy.deepcopy(base), r=2, target_modules=targets)
        lightning_peft.save_adapter(module, tmp_path / name)
    for name in order:
        lightning_peft.load_adapter(base, tmp_path / name, adapter_name=name)
    assert engine.require_record(base).adapter_names == list(order)


def test_a_trained_head_under_another_adapter_is_not_its_base(tmp_path: Path) -> None:
    base = plain()
    module = injected(copy.deepcopy(base).requires_grad_(False), r=2, target_modules=["2"])
    lightning_peft.save_adapter(module, tmp_path)
    other = injected(copy.deepcopy(base), r=2, target_modules=["0"], adapter_name="first")
    train(other)
    with pytest.raises(BaseMismatchError, match="was trained on another base"):
        lightning_peft.load_adapter(other, tmp_path, adapter_name="second")


def test_a_folder_from_before_heads_counted_still_loads(tmp_path: Path) -> None:
    base = plain().requires_grad_(False)
    module = injected(copy.deepcopy(base), r=2, target_modules=["0"])
    lightning_peft.save_adapter(module, tmp_path)
    file = tmp_path / "provenance.json"
    facts = json.loads(file.read_text())
    facts["base"]["fingerprint"] = engine.require_record(module).parts[""].base.digest()
    del facts["base"]["left_out"], facts["modules_to_save"]
    file.write_text(json.dumps(facts))
    lightning_peft.load_adapter(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        base[2].weight += 1
    with pytest.raises(BaseMismatchError):
        lightning_peft.load_adapter(base, tmp_path)


def test_the_reference_of_a_taken_over_model_is_the_original(tmp_path: Path) -> None:
    base, x = plain(), torch.randn(3, 4)
    config = lora(target_modules=["0"], modules_to_save=["2", "4"])
    theirs = get_peft_model(copy.deepcopy(base), config)
    train(theirs)
    expected = theirs(x)
    module = nn.ModuleDict({"inner": theirs})
    lightning_peft.inject(module)
    assert torch.equal(module["inner"](x), expected)
    with lightning_peft.disable_adapters(module):
        assert torch.equal(module["inner"](x), base(x))
    assert torch.equal(module["inner"](x), expected)
