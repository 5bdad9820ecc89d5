"""What is adapted when nothing is said, and what counts as a head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Stack, stack, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.selection.parts import (
    base_modules,
    find_heads,
    inside,
    output_embeddings,
    parameter_holders,
    tied_layers,
)
from lightning_peft.engine.selection.scope import find_parts
from lightning_peft.errors import TargetModulesError


def tiny_bert_classifier() -> BertForSequenceClassification:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=40, intermediate_size=64, **size))


class Larger(nn.Module):
    """A user's module around two pretrained models, with layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.text = nn.ModuleDict({"model": tiny_llama(layers=1)})
        self.encoder = tiny_bert_classifier()
        self.head = nn.Linear(8, 2)


def test_pretrained_parts_are_found_inside_a_larger_module() -> None:
    module = Larger()
    assert list(find_parts(module)) == ["text.model", "encoder"]
    for whole in (tiny_llama(), stack()):
        assert find_parts(whole) == {"": whole}


def test_parts_by_name() -> None:
    module = Larger()
    assert list(find_parts(module, "embed")) == ["embed"]
    assert list(find_parts(module, ["encoder", "embed"])) == ["encoder", "embed"]
    assert find_parts(module, [""]) == {"": module}


def test_wrong_names_are_listed_together_with_near_ones() -> None:
    with pytest.raises(TargetModulesError) as caught:
        find_parts(Larger(), ["encodr", "text", "text.model", "nothing"])
    message = str(caught.value)
    assert "adapt='encodr' is not a submodule of Larger; near names: encoder" in message
    assert "adapt='text.model' lies inside 'text'" in message
    assert "adapt='nothing' is not a submodule" in message
    with pytest.raises(TargetModulesError, match="names no submodule"):
        find_parts(Larger(), [])


def test_everything_outside_the_parts_is_left_alone() -> None:
    module = Larger()
    module.embed.requires_grad_(False)
    lightning_peft.inject(module, r=2, quantization_config=engine.quantization_config())
    assert not module.embed.weight.requires_grad
    assert module.head.weight.requires_grad
    assert type(module.head) is nn.Linear
    assert lightning_peft.report(module).outside == 8 * 2 + 2
    assert engine.require_record(module).parts.keys() == {"text.model", "encoder"}


def test_classification_head_stays_as_the_user_left_it_and_is_not_quantized() -> None:
    for trainable in (True, False):
        model = tiny_bert_classifier()
        model.classifier.requires_grad_(trainable)
        lightning_peft.inject(model, r=2, quantization_config=engine.quantization_config())
        assert type(model.classifier) is nn.Linear
        assert model.classifier.weight.requires_grad is trainable
        assert not model.bert.pooler.dense.bias.requires_grad
        state = "trainable" if trainable else "frozen"
        assert lightning_peft.report(model).parts[0].heads == {"classifier": state}


def test_pretrained_output_embeddings_are_not_a_head() -> None:
    model = BertForMaskedLM(tiny_bert_classifier().config)
    assert find_heads(model) == {}
    lightning_peft.inject(model, r=2)
    assert not model.cls.predictions.transform.dense.bias.requires_grad
    assert not model.cls.predictions.bias.requires_grad


class Timm(Stack):
    def get_classifier(self) -> nn.Module:
        return self.second


def linear(outputs: int = 2) -> nn.Linear:
    return nn.Linear(4, outputs)


class Decoder(nn.Module):
    """One task of several, with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = linear(4), linear()


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = linear(4)


def named(kind: type[nn.Module], *names: str, **more: nn.Module) -> nn.Module:
    return nn.ModuleDict({**{name: kind() for name in names}, **more})


HEADS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "classifier of transformers": (
        lambda: LlamaForSequenceClassification(tiny_llama().config),
        ["score"],
    ),
    "language model": (tiny_llama, []),
    "backbone": (lambda: tiny_llama().model, []),
    "tied output": (tiny_gpt2, []),
    "classifier of timm": (Timm, ["second"]),
    "by its name": (stack, ["head"]),
    "last linear layer": (
        lambda: nn.Sequential(linear(4), nn.ReLU(), linear(), nn.Dropout()),
        ["2"],
    ),
    "several layers": (
        lambda: nn.ModuleDict({"classifier": nn.Sequential(linear(4), linear())}),
        ["classifier"],
    ),
    "name of nothing": (
        lambda: nn.ModuleDict({"head": nn.Identity(), "a": linear()}),
        ["a"],
    ),
    "a layer alone": (linear, []),
    "layers of repeated blocks": (
        lambda: nn.ModuleDict({"blocks": nn.ModuleList(Gate() for _ in range(3)), "fc": linear()}),
        ["fc"],
    ),
    "blocks of one class": (lambda: named(Gate, "a", "b", "c"), ["a.fc", "b.fc", "c.fc"]),
    "blocks of one class and a head": (lambda: named(Gate, "a", "b", "c", head=linear()), ["head"]),
    "two of one class and a head": (
        lambda: named(Gate, "student", "teacher", head=linear()),
        ["student.fc", "teacher.fc", "head"],
    ),
    "heads of several tasks": (
        lambda: named(Decoder, "a", "b", "c", classifier=linear()),
        ["a.head", "b.head", "c.head", "classifier"],
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads(case: str) -> None:
    build, expected = HEADS[case]
    assert list(find_heads(build())) == expected


def test_output_embeddings() -> None:
    model = tiny_gpt2()
    assert output_embeddings(model) is model.lm_head
    assert output_embeddings(stack()) is None


class Tied(nn.Module):
    """A plain language model whose output shares the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.hidden(self.embed(ids))))


def test_an_output_tied_to_an_embedding_is_neither_head_nor_target_and_stays_frozen() -> None:
    model = Tied()
    assert tied_layers(model) == ["lm_head"]
    assert find_heads(model) == {}
    lightning_peft.inject(model, r=2, quantization_config=engine.quantization_config())
    assert engine.adapted_layers(model).keys() == {"hidden"}
    assert model.lm_head.weight is model.embed.weight
    assert not model.embed.weight.requires_grad
    assert engine.require_record(model).frozen == {
        "embed.weight",
        "lm_head.weight",
        "hidden.weight",
        "hidden.bias",
    }


def test_base_modules_are_the_same_before_and_after_injection() -> None:
    model = tiny_llama()
    before = list(base_modules(model))
    lightning_peft.inject(model, r=2)
    assert list(base_modules(model)) == before
    assert len(dict(model.named_modules())) > len(before)


def test_holders_count_an_aliased_layer_once() -> None:
    model = Tied()
    model.alias = model.hidden
    holders = parameter_holders(model)
    assert holders[id(model.hidden.weight)] == ["hidden"]
    assert holders[id(model.embed.weight)] == ["embed", "lm_head"]


def test_inside() -> None:
    assert inside("a.b", ["a"])
    assert inside("a", ["a"])
    assert inside("a", [""])
    assert not inside("ab", ["a"])
    assert not inside("a", ["a.b"])
