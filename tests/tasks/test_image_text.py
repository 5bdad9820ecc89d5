"""Image-text-to-text models: which parts are adapted, quantized, trained in full, or left."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import short_runs
import torch
from image_text_models import FAMILIES, config_of, tiny_model
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, dynamic_module_utils

from lightning_peft.data.image_text import ImageTextData
from lightning_peft.data.image_tokens import ImageTokens
from lightning_peft.engine import merge, record_of, save_adapter
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.export.loading_code import adapter_code
from lightning_peft.plugin.injection_settings import names_part
from lightning_peft.plugin.loading import load_from_checkpoint
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.image_text import ImageTextToText, model_parts

Image = pytest.importorskip("PIL.Image")

# The others run with `make test-long`.
LONG = pytest.mark.long
SOME = [name if name == "llava" else pytest.param(name, marks=LONG) for name in FAMILIES]
SAVED = [name if name == "qwen2_vl" else pytest.param(name, marks=LONG) for name in FAMILIES]
WITH_METHODS = [
    pytest.param(name, method, marks=() if (name, method) == ("llava", "qlora") else LONG)
    for name in FAMILIES
    for method in short_runs.STRATEGIES
]
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220)}


def drawing(colour: str, seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(-20, 20, (16, 16, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(tmp_path):
    """Makes data of nine images in three colours, and three rows of text alone."""

    def data(family="llava", **options):
        rows = []
        for seed in range(9):
            colour = list(COLOURS)[seed % 3]
            (tmp_path / f"{seed}.png").write_bytes(drawing(colour, seed))
            rows.append({"prompt": "<image>?", "completion": colour, "images": [f"{seed}.png"]})
        rows += [{"prompt": f"Say {n}", "completion": f"{n}"} for n in range(3)]
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        options = {"batch_size": 6, "validation_share": 0, **options}
        cache = str(tmp_path / "cache")
        made = short_runs.make(ImageTextData, str(path), "given", cache_dir=cache, **options)
        made._images = ImageTokens(FAMILIES[family].processor())
        return made

    return data


@pytest.fixture
def base(tmp_path):
    """Saves the base of a family, with random values."""

    def base(family, processor):
        folder = tmp_path / f"base-{family}"
        if not folder.is_dir():
            model = tiny_model(family, processor)
            torch.manual_seed(1)
            for param in model.parameters():
                # Larger than those of a new model, in which little depends on the input.
                if param.ndim > 1:
                    torch.nn.init.normal_(param, std=0.15)
            model.save_pretrained(folder)
        return str(folder)

    return base


def task(place, **options):
    return short_runs.make(ImageTextToText, place, learning_rate=1e-2, **options)


def fitted(module, rows, method="lora", steps=1, **settings):
    strategy = short_runs.STRATEGIES[method](r=4, announce=False, optimizer=None, **settings)
    run = short_runs.trainer(strategy=strategy, max_steps=steps, num_sanity_val_steps=0)
    run.fit(module, rows)
    return run


def inside(name: str, part: str) -> bool:
    return name.removeprefix("model.").startswith(f"{part}.")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_found_by_what_stands_next_to_the_decoder(family):
    known = FAMILIES[family]
    parts = model_parts(tiny_model(family, known.processor()))
    assert parts.projectors == (known.projector,)
    assert parts.output == "lm_head"
    if family == "qwen2_vl":
        # Its projector is inside of the part that sees.
        assert parts.vision == ("model.visual.patch_embed", "model.visual.blocks")
    else:
        assert parts.vision == (known.vision,)


@pytest.mark.parametrize(("family", "method"), WITH_METHODS)
def test_the_language_part_is_adapted_the_projector_trained_and_the_rest_left(
    family, method, data, base
):
    known, rows = FAMILIES[family], data(family)
    module = task(base(family, rows.image_tokens.processor))
    losses = []
    module.on_train_batch_end = lambda out, *_: losses.append(out["loss"].item())
    start = short_runs.values()
    module.configure_callbacks = lambda: [start]
    fitted(module, rows, method, steps=24, verify="full" if family == "idefics3" else "cheap")
    moved = short_runs.changed(start.before, module)
    projector = {n for n in start.before if inside(n, known.projector)}
    assert projector <= moved
    adapters = moved - projector
    assert all(inside(n, known.language) and "lora_" in n for n in adapters)
    # q, k, v, o, gate, up, down, with two factors, in two blocks.
    assert len(adapters) == 7 * 2 * 2
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    (part,) = record_of(module).parts.values()
    quantized = [part.qualified(name) for name in part.quantized]
    assert len(quantized) == (14 if method == "qlora" else 0)
    assert all(inside(n, known.language) for n in quantized)
    if method == "qlora":
        kept = part.quantization["llm_int8_skip_modules"]
        assert {known.projector, "lm_head"} <= set(kept)
        code = adapter_code({"quantization": part.quantization}, "mine", "base", None, None)
        assert f"llm_int8_skip_modules={kept!r}" in code


def gradients(place, rows, settings=None, **options):
    """Returns the gradients of the first step by name, as the sum of their amounts."""
    module = task(place, **options)
    found = {}
    module.on_before_optimizer_step = lambda *_: found.update(
        {
            name: param.grad.abs().sum().item()
            for name, param in module.named_parameters()
            if param.grad is not None
        }
    )
    fitted(module, rows, **(settings or {}))
    return found


def seeing(found, known):
    """Returns the names in the vision part with a gradient that is not zero."""
    names = [n for n in found if inside(n, known.vision) and not inside(n, known.projector)]
    return [n for n in names if found[n] > 0]


@pytest.mark.parametrize("family", SOME)
def test_the_vision_part_gets_gradients_only_where_it_is_named(family, data, base):
    known, rows = FAMILIES[family], data(family)
    place = base(family, rows.image_tokens.processor)
    # PEFT alone would take the layers of both parts that are called so.
    assert seeing(gradients(place, rows, {"target_modules": ["q_proj", "v_proj"]}), known) == []
    named = seeing(gradients(place, rows, adapt_vision=True), known)
    assert named
    assert all("lora_B" in name for name in named)


@LONG
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_name_the_vision_part_and_the_projector_has_three_settings(family, data, base):
    known, rows = FAMILIES[family], data(family)
    place = base(family, rows.image_tokens.processor)
    word = known.vision.rpartition(".")[2]
    pattern = rf".*{word}\..*(q_proj|qkv)|.*(language|text)_model\..*q_proj"
    named = seeing(gradients(place, rows, {"target_modules": pattern}), known)
    assert named
    assert all("q_proj" in name or "qkv" in name for name in named)
    frozen = gradients(place, rows, projector="frozen")
    assert not [name for name in frozen if inside(name, known.projector)]
    if family == "gemma3":
        # Its projector is a bare parameter, and refused.
        return
    adapted = gradients(place, rows, projector="adapters")
    projected = [name for name in adapted if inside(name, known.projector)]
    assert projected
    assert all("lora_" in name for name in projected)


@pytest.mark.parametrize("family", SAVED)
def test_checkpoints_adapter_folders_and_merges_answer_the_same(family, data, base, tmp_path):
    rows = data(family)
    place = base(family, rows.image_tokens.processor)
    module = task(place)
    run = fitted(module, rows, steps=3)
    run.save_checkpoint(tmp_path / "one.ckpt")
    batch = next(iter(rows.loader("train")))
    module.eval()
    with torch.no_grad():
        expected = module(**batch).logits
        loaded = load_from_checkpoint(
            bind_to_lightning(ImageTextToText, ROOTS[1]), tmp_path / "one.ckpt"
        ).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected)
        folder = save_adapter(module, tmp_path / "adapter")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["modules_to_save"]
        other = module.auto_class.from_pretrained(place)
        wrapped = PeftModel.from_pretrained(other, str(folder)).eval()
        torch.testing.assert_close(wrapped(**batch).logits, expected)
        merge(module)
        torch.testing.assert_close(module(**batch).logits, expected, atol=1e-4, rtol=1e-4)


@LONG
def test_predictions_are_of_the_images_of_their_rows(data, base):
    rows = data(validation_share=0.4)
    module = task(base("llava", rows.image_tokens.processor))
    run = fitted(module, rows, steps=60)
    found = [one for batch in run.predict(module, datamodule=rows) for one in batch]
    assert len(found) == len(rows.read().splits["validation"]) > 3
    seen = [one for one in found if "[image of 16 x 16 pixels, 4 tokens]?" in one["prompt"]]
    assert len({one["expected"] for one in seen}) > 1
    assert [one["generated"] for one in seen] == [one["expected"] for one in seen]
    with pytest.raises(UnsupportedError, match="predict takes the rows of"):
        module.predict_step(next(iter(rows.loader("train"))), 0)


def test_a_processor_of_another_model_is_refused_before_the_model_is_loaded(data, base):
    rows = data()
    config = config_of("llava", rows.image_tokens.processor)
    module = task("none", config={**config, "image_token_index": 7})
    with pytest.raises(ConfigError, match=r"as the tokens \[\d+\], and 'none' takes the token 7"):
        fitted(module, rows)
    assert module.model is None


def test_a_model_with_an_encoder_for_text_is_refused(data):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 384}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    text = {"model_type": "bart", **sizes, **heads, "is_encoder_decoder": True}
    module = task("none", config={"model_type": "florence2", "text_config": text})
    with pytest.raises(UnsupportedError, match="is a florence2 model, whose decoder writes what"):
        fitted(module, data())


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_projector_of_16_bits_trains_in_32_and_changes(family, precision, data, tmp_path):
    rows = data(family)
    model = tiny_model(family, rows.image_tokens.processor).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    known = {n: p.float() for n, p in model.named_parameters()}
    module = task(str(tmp_path / "base"))
    module.hparams.learning_rate = 2e-4
    losses = []
    module.on_train_batch_end = lambda out, *_: losses.append(out["loss"].item())
    strategy = short_runs.STRATEGIES["lora"](r=4, announce=False, optimizer=None)
    short_runs.trainer(strategy=strategy, max_steps=3, precision=precision).fit(module, rows)
    assert np.isfinite(losses).all()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    whole = {n: p for n, p in trained.items() if "lora_" not in n}
    assert whole
    for name, found in whole.items():
        moved = (
            found.detach() != known[name.partition(".")[2].replace(".modules_to_save.default", "")]
        )
        # In bfloat16, steps of 2e-4 leave most weights as they are.
        assert moved.float().mean() > 0.9, name


def test_a_projector_that_the_setting_cannot_apply_to_is_refused(data):
    config = config_of("gemma3", FAMILIES["gemma3"].processor())
    module = task("none", config=config, projector="adapters")
    wanted = "the projector of 'none' .model.multi_modal_projector. has no linear layer"
    with pytest.raises(UnsupportedError, match=wanted):
        fitted(module, data("gemma3"))
    assert module.model is None
    module = task("none", config=config, projector="full")
    module._skeleton = lambda: WithoutProjector()
    with pytest.raises(UnsupportedError, match="projector='full', and 'none' .WithoutProjector"):
        module.adapter_defaults()
    module.hparams.projector = "frozen"
    assert module.adapter_defaults().left == ("vision_tower",)


class Part(PreTrainedModel):
    """A model of transformers inside of another one."""

    config_class = PretrainedConfig

    def __init__(self, *inside):
        super().__init__(PretrainedConfig())
        self.layer = nn.Linear(2, 2)
        for name in inside:
            self.add_module(name, nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))


class WithoutProjector(nn.Module):
    """A decoder next to parts of other names."""

    def __init__(self, inside=(), **others):
        super().__init__()
        self.language_model, self.vision_tower = Part(), Part(*inside)
        for name, part in others.items():
            self.add_module(name, part)

    def get_decoder(self):
        return self.language_model

    def get_output_embeddings(self):
        return None


def test_projectors_are_known_by_their_name_where_they_are_models():
    other = model_parts(WithoutProjector(image_projector=Part()))
    assert other.projectors == ("image_projector",)
    assert other.vision == ("vision_tower",)
    # Inside of the part that sees; of a list, PEFT trains what is in it.
    merged = model_parts(WithoutProjector(inside=["connector"]))
    assert merged.projectors == ("vision_tower.connector.0", "vision_tower.connector.1")
    assert merged.vision == ("vision_tower.layer",)


def test_patterns_name_a_part_that_they_match_in():
    names = ["model.visual.blocks.0.q_proj", "model.visual.blocks", "model.language_model.q_proj"]
    without = r"^(?!.*visual).*(q_proj|v_proj)$"
    assert not names_part(without, "model.visual.blocks", names)
    assert names_part(r".*visual.*q_proj", "model.visual.blocks", names)
    assert not names_part(r".*(q_proj|v_proj)", "model.visual.blocks", names)
    assert names_part(["blocks.0.q_proj"], "model.visual.blocks", names)
    module = task("none", config=config_of("qwen2_vl", FAMILIES["qwen2_vl"].processor()))
    assert "model.visual.blocks.0.attn.qkv" in module.adapter_defaults().inside


def test_parts_of_a_model_with_code_of_its_own_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = config_of("llava", FAMILIES["llava"].processor())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.Own"}
    fields = {**config, "model_type": "own_llava", "architectures": ["Own"], "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "own.py").write_text(
        "from transformers import LlavaConfig, LlavaForConditionalGeneration\n"
        "class OwnConfig(LlavaConfig):\n    model_type = 'own_llava'\n"
        "class Own(LlavaForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    module = task(str(tmp_path), trust_remote_code=True, revision="main")
    for _ in range(2):
        assert module.adapter_defaults().saved == ("model.multi_modal_projector",)
