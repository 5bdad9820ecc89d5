"""Chat with models that see: an image goes through the processor, to its place in the question."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from finished import BASE
from image_text_models import byte_tokenizer, saved_adapter
from transformers import AutoModelForImageTextToText, PaliGemmaProcessor

from lightning_peft.chat.conversation import Conversation
from lightning_peft.chat.images import find_images
from lightning_peft.chat.protocol import Server
from lightning_peft.cli import main
from lightning_peft.cli.chat import _parser, load_chat_model
from lightning_peft.cli.chat import main as chat
from lightning_peft.data.images import load_image_processor
from lightning_peft.errors import ConfigError
from lightning_peft.export.adapters import find_adapters
from lightning_peft.export.base import find_base

Image = pytest.importorskip("PIL.Image")

LONG = pytest.mark.long
# Qwen-VL's processor cannot be read from files without torchvision.
SAVED = ["llava", pytest.param("idefics3", marks=LONG), pytest.param("gemma3", marks=LONG)]
WORDS = ("--max-new-tokens", "6")


def drawing(folder, colour, size=(20, 16)):
    path = folder / f"{colour}.png"
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def run(tmp_path):
    return partial(saved_adapter, tmp_path)


def asked(*words):
    return Conversation(load_chat_model(_parser().parse_args([*words, *WORDS])))


def expected(model, processor, turns, images):
    """What transformers says by the processor's own ways."""
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    files = [Image.open(path) for path in images]
    inputs = processor(text=[text], images=[files], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=[2]
        )
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def parts(text, images=1):
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


@pytest.mark.parametrize("family", SAVED)
def test_base_and_adapter_see_what_the_processor_makes_of_an_image(family, run, tmp_path):
    base, adapter = run(family)
    red, blue = drawing(tmp_path, "red"), drawing(tmp_path, "blue", (16, 24))
    talk = asked(f"mine={adapter}", "--base", str(base))
    processor, model = talk.chat_model.images.processor, talk.chat_model.loaded.model
    assert str(talk.run_command(f"/image {red}")).startswith(f"{red}: 20 x 16 pixels, ")
    tuned = talk.ask("What is it?", lambda text: None).text
    question = [{"role": "user", "content": parts("What is it?")}]
    assert tuned == expected(model, processor, question, [red]).strip()
    # The second question is about the second image, with the first one above it.
    talk.run_command(f"/image {blue}")
    second = talk.ask("And now?", lambda text: None).text
    turns = [*question, {"role": "assistant", "content": [{"type": "text", "text": tuned}]}]
    turns += [{"role": "user", "content": parts("And now?")}]
    assert second == expected(model, processor, turns, [red, blue]).strip()
    talk.run_command("/reset")
    talk.run_command("/base")
    talk.run_command(f"/image {red}")
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    first = talk.ask("What is it?", lambda text: None).text
    assert first == expected(plain, processor, question, [red]).strip()
    # Text alone is a part of its turn too, and several go through the model at once.
    only = [[{"role": "user", "content": text}] for text in ("Hello?", "Where are we now?")]
    assert "Hello?" in processor.tokenizer.decode(talk.chat_model.tokens_of(only[0])[0])
    alone = [talk.chat_model.answer(messages) for messages in only]
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: lengths.append(len(given["input_ids"])), with_kwargs=True
    )
    with hook:
        assert talk.chat_model.answers(only) == alone
    assert max(lengths) == 2


def test_a_program_sends_images(run, tmp_path):
    base, adapter = run("llava")
    red, blue = drawing(tmp_path, "red"), drawing(tmp_path, "blue", (16, 24))
    talk = asked(f"mine={adapter}", "--base", str(base))
    said = []
    for image in (red, blue):
        talk.run_command(f"/image {image}")
        said.append(talk.ask("What is it?", lambda text: None).text)

    def turn(content, role="user"):
        return {
            "role": role,
            "content": "What is it?",
            "images": [base64.b64encode(content).decode()],
        }

    first = [turn(red.read_bytes())]
    both = [*first, {"role": "assistant", "content": said[0]}, turn(blue.read_bytes())]
    requests = [
        {"messages": first, "adapter": "base"},
        {"messages": both},
        {"rows": [{"messages": both, "reference": said[1]}], "adapters": ["mine"]},
        {"messages": [turn(b"no image")]},
        {"messages": [{**first[0], "images": ["\u00e9"]}]},
        {"messages": [turn(b"", "assistant"), *first]},
    ]
    lines = [json.dumps({"id": number, **one}) for number, one in enumerate(requests)]
    out = io.StringIO()
    Server(lines, out).serve(lambda say: talk.chat_model)
    replies: dict[int, Any] = {number: [] for number in range(len(lines))}
    for line in map(json.loads, out.getvalue().splitlines()):
        if "ready" in line:
            assert line["ready"]["images"] is True
        elif "id" in line:
            replies[line["id"]].append(line)
    texts = ["".join(row.get("text", "") for row in rows).strip() for rows in replies.values()]
    assert texts[0] != said[0]
    assert texts[1] == said[1] != said[0]
    scored = next(row["row"] for row in replies[2] if "row" in row)
    assert scored["answers"] == {"mine": said[1]}
    assert scored["scores"]["mine"]["exact"]
    problems = [replies[number][-1]["error"] for number in (3, 4, 5)]
    assert problems[0] == "Image 1 of the turn is not an image that Pillow reads."
    assert problems[1].startswith("Image 1 of the turn is not base64: ")
    assert "messages[0]: images are shown in the user's turns alone" in problems[2]


@LONG
def test_a_base_alone_and_one_of_16_bits(run, tmp_path, capsys):
    base, adapter = run("llava", torch.bfloat16)
    red = drawing(tmp_path, "red")
    given = ["--image", str(red), "--prompt", "What is it?", *WORDS, "--json"]
    assert main(["chat", "--base", str(base), *given]) == 0
    assert main(["chat", f"mine={adapter}", "--base", str(base), *given]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["adapter"] for row in rows] == ["base", "mine"]
    assert rows[0]["answer"] != rows[1]["answer"]


def test_images_that_cannot_be_shown_are_refused(run, tmp_path, capsys, monkeypatch):
    base, _ = run("llava")
    talk = asked("--base", str(base))
    (tmp_path / "text.png").write_text("no image")
    for path, problem in [
        (tmp_path / "none.png", "names '.*none.png', which cannot be read: No such file"),
        (tmp_path / "text.png", "The question .*image"),
        ("https://x.org/a.png", "names 'https://x.org/a.png' as an image, which is not a file"),
        ("", "names '' as an image"),
        ("~nouser/x.png", "names '~nouser/x.png', which cannot be read"),
        (f"'{tmp_path}/none.png'", f"names '{tmp_path}/none.png', which cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            talk.run_command(f"/image {path}")
    for text, problem in [("a\ufffcb", r"the character U\+FFFC"), ("a <image>?", "0 images and, ")]:
        with pytest.raises(ConfigError, match=problem):
            talk.ask(text, lambda piece: None)
    assert not talk.turns
    with pytest.raises(ConfigError, match="--image is for a conversation; requests of --serve"):
        chat(["--base", str(base), "--serve", "--image", "a.png"])
    monkeypatch.setattr("sys.stdin", io.StringIO("/image a.png\n"))
    assert main(["chat", "--base", str(BASE), "--chat-template", "plain"]) == 2
    assert "'a.png' cannot be shown to this model, which reads text" in capsys.readouterr().err


def test_text_needs_neither_processor_nor_pillow(run, tmp_path, capsys, monkeypatch):
    base, adapter = run("llava")
    files = {path: path.read_bytes() for path in base.glob("*processor_config.json")}
    for path in files:
        path.unlink()
    given = ["--chat-template", "plain", *WORDS]
    assert main(["chat", f"a={adapter}", "--base", str(base), "--prompt", "x", *given]) == 0
    noted = capsys.readouterr().err
    assert "note: images cannot be shown: " in noted
    assert "its processor cannot be had" in noted
    show = ["--image", str(drawing(tmp_path, "red")), "--prompt", "x"]
    assert main(["chat", "--base", str(base), *show, *given]) == 2
    assert "red.png' cannot be shown to the model: " in capsys.readouterr().err
    for path, content in files.items():
        path.write_bytes(content)
    found, known = find_base(str(base)), find_adapters([str(adapter)])
    images = load_image_processor(
        {"image_processor_type": "SiglipImageProcessor", "image_seq_length": 4}
    )
    PaliGemmaProcessor(images, byte_tokenizer("<image>")).save_pretrained(tmp_path / "pali")
    pali = find_base(str(base))
    pali.folder = tmp_path / "pali"
    assert "PaliGemmaProcessor takes no text without images" in find_images(pali, [])[1]
    monkeypatch.setattr("lightning_peft.data.images.find_spec", lambda name: None)
    assert "pip install pillow" in find_images(found, [])[1]
    # One that was trained with a processor is not asked without it.
    record = {"data": {"settings": {"encoding": {"processor": "0"}}}}
    trained = [replace(known[0], facts={**known[0].facts, **record})]
    with pytest.raises(ConfigError, match="pip install pillow"):
        find_images(found, trained)
