"""The advice, from real plans of a small model and devices made to measure."""

import pytest
from transformers import LlamaConfig

from lightning_peft.plan.device_memory import DeviceMemory
from lightning_peft.plan.method_comparison import Recommendation, recommend
from lightning_peft.plan.prediction import predict
from lightning_peft.plan.settings import METHODS, PlanSettings
from lightning_peft.plan.sources import from_config
from lightning_peft.plan.suggestions import memory_warning, out_of_memory_message, suggest_changes

SIZES = {
    "architectures": ["LlamaForCausalLM"], "dtype": "float32", "vocab_size": 512,
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def source():
    return from_config(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def plans(source):
    runs = {m: PlanSettings(m, gradient_checkpointing=False, device="cpu") for m in METHODS}
    return {method: predict(source, run) for method, run in runs.items()}


def device(size):
    return DeviceMemory("a card", size, "cpu")


def test_lora_where_it_is_comfortable(plans):
    advice = recommend(plans, device(4 * plans["full"].high_bytes))
    assert advice.method == "lora"
    assert "comfortable" in advice.text
    assert "all weights would fit too" in advice.text


def test_qlora_where_lora_does_not_fit_or_leaves_little_room(plans):
    tight = recommend(plans, device(plans["lora"].high_bytes))
    assert tight.method == "qlora"
    assert "little room" in tight.text
    small = recommend(plans, device(plans["qlora"].high_bytes))
    assert small.method == "qlora"
    assert "LoRA may not fit" in small.text or "LoRA does not fit" in small.text
    assert plans["lora"].verdict(1) == "does not fit"


def test_none_where_none_fits(plans):
    advice = recommend(plans, device(plans["qlora"].low_bytes - 1))
    assert advice.method is None
    assert "None of the methods fits" in advice.text
    text = "lora: a run with qlora cannot share the base of this model."
    rest = {method: plan for method, plan in plans.items() if method != "qlora"}
    assert recommend(rest, None) == Recommendation("lora", text)


def test_without_a_device_the_sizes_are_compared(plans):
    assert recommend(plans, None).method == "lora"
    assert "--gpu" in recommend(plans, None).text


def test_a_warning_only_where_the_plan_does_not_fit(plans):
    plan = plans["lora"]
    assert memory_warning(plan, device(plan.high_bytes)) is None
    assert "may not fit" in memory_warning(plan, device(plan.peak_bytes))
    assert "will not fit" in memory_warning(plan, device(plan.low_bytes - 1))


def test_out_of_memory_names_the_parts_and_three_changes(source, plans):
    run = PlanSettings(
        "lora", batch_size=8, seq_len=256, gradient_checkpointing=False, device="cpu"
    )
    plan = predict(source, run)
    room = device(plan.high_bytes - plan.allocated // 2)
    changes = suggest_changes(source, plan, room.bytes)
    assert len(changes) == 3
    for change in changes:
        after = predict(source, change.settings)
        assert change.saved == plan.peak_bytes - after.peak_bytes > 0
        assert after.fits(room.bytes) == (change.needed <= room.bytes)
    assert changes[0].words == "gradient_checkpointing=True"
    assert all(change.needed <= room.bytes for change in changes)
    text = out_of_memory_message(plan, room, changes)
    assert "activations" in text
    assert text.count("then it fits") == 3
    # The same number of rows in each step.
    smaller = next(c.settings for c in changes if c.settings.batch_size < 8)
    assert smaller.batch_size * smaller.accumulate == 8
