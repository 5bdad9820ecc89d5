"""What is adapted when nothing is said, and what counts as a head."""

from __future__ import annotations

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


def test_only_the_outermost_pretrained_model_is_a_part() -> None:
    model = tiny_llama()
    assert find_parts(model) == {"": model}


def test_a_module_without_pretrained_parts_is_one_part() -> None:
    module = stack()
    assert find_parts(module) == {"": module}


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


def test_heads_of_transformers_models() -> None:
    llama = LlamaForSequenceClassification(tiny_llama().config)
    assert list(find_heads(llama)) == ["score"]
    assert list(find_heads(tiny_llama())) == []
    assert list(find_heads(tiny_llama().model)) == []
    model = tiny_gpt2()
    assert list(find_heads(model)) == []
    assert output_embeddings(model) is model.lm_head
    assert output_embeddings(stack()) is None


def test_head_of_a_plain_stack_is_found_by_name_else_the_last_linear() -> None:
    assert list(find_heads(stack())) == ["head"]
    unnamed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Dropout())
    assert list(find_heads(unnamed)) == ["2"]
    deep = nn.ModuleDict({"classifier": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))})
    assert list(find_heads(deep)) == ["classifier"]
    assert list(find_heads(nn.ModuleDict({"head": nn.Identity(), "a": nn.Linear(2, 2)}))) == ["a"]
    assert list(find_heads(nn.Linear(2, 2))) == []


def test_layers_in_repeated_blocks_are_not_heads() -> None:
    blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(3)])
    model = nn.ModuleDict({"blocks": blocks, "fc": nn.Linear(4, 2)})
    assert list(find_heads(model)) == ["fc"]


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


def test_layers_in_blocks_of_one_class_are_not_heads_next_to_another() -> None:
    gates = {name: Gate() for name in ("first", "second", "third")}
    assert list(find_heads(nn.ModuleDict({**gates, "head": nn.Linear(4, 2)}))) == ["head"]
    assert list(find_heads(nn.ModuleDict(gates))) == ["first.fc", "second.fc", "third.fc"]
    pair = {name: Gate() for name in ("student", "teacher")}
    both = nn.ModuleDict({**pair, "head": nn.Linear(4, 2)})
    assert list(find_heads(both)) == ["student.fc", "teacher.fc", "head"]


class Decoder(nn.Module):
    """One task of several, with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 2)


def test_heads_of_several_tasks_stay_heads() -> None:
    tasks = {name: Decoder() for name in ("depth", "edges", "normals")}
    heads = find_heads(nn.ModuleDict({**tasks, "classifier": nn.Linear(4, 2)}))
    assert list(heads) == ["depth.head", "edges.head", "normals.head", "classifier"]


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


def test_the_classifier_of_a_timm_model_is_its_head() -> None:
    class Timm(Stack):
        def get_classifier(self) -> nn.Module:
            return self.second

    assert list(find_heads(Timm())) == ["second"]


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
