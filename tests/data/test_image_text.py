"""Conversations with images: their tokens, masks and features, for four families of models."""

from __future__ import annotations

import base64
import json
import logging
import re
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from image_text_models import FAMILIES, tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor

from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.image_text import ImageTextData
from lightning_peft.data.image_tokens import ImageTokens
from lightning_peft.data.processors import load_processor
from lightning_peft.errors import ConfigError, UnsupportedError

from .conftest import refusal
from .test_images import content, picture

Image = pytest.importorskip("PIL.Image")
END = "<|im_end|>"


def user(*parts) -> dict:
    return {"role": "user", "content": [*parts]}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


SEEN = {"type": "image"}
# Three images over two questions; one; none.
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "<image>\nand <image> differ?"},
            answer("Yes, they do."),
            {"role": "user", "content": "Now <image>"},
            answer("No more."),
        ],
        "images": ["0.png", "1.png", "2.png"],
    },
    {"messages": [user(SEEN, said("What is it?")), answer("A cat.")], "images": ["3.png"]},
    {"messages": [user(said("Hello")), answer("Hi there")]},
]
SIZES = [(30, 20), (16, 40), (33, 33), (50, 9)]


@pytest.fixture
def folder(tmp_path):
    """A folder of four images."""
    for place, size in enumerate(SIZES):
        picture(place, *size).save(tmp_path / f"{place}.png")
    return tmp_path


@pytest.fixture
def make(folder, build, write):
    """Makes data of rows, with the processor of a family."""

    def make(rows, family="llava", processor=None, **options):
        path = write(rows) if isinstance(rows, list) else rows
        options = {"validation_share": 0, "batch_size": len(ROWS), **options}
        data = build(ImageTextData, path, processor="given", **options)
        data._images = ImageTokens(processor or FAMILIES[family].processor())
        return data

    return make


def prepared(data) -> list[dict]:
    data.setup("fit")
    return list(data.read().splits["train"])


def trained(data, row) -> list[str]:
    """The texts of the runs of tokens that are trained."""
    return [span.text for span in data.render_row(row) if span.trained]


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answers_are_trained_and_tokens_are_those_of_the_processor(
    make, folder, family
):
    data = make(ROWS, family)
    processor = data.image_tokens.processor
    rows = prepared(data)
    for row, source in zip(rows, ROWS, strict=True):
        answers = [t["content"] for t in source["messages"] if t["role"] == "assistant"]
        assert trained(data, row) == [text + END for text in answers]
        count = sum(len(processor.tokenizer(text + END)["input_ids"]) for text in answers)
        assert sum(label != IGNORED for label in row["labels"]) == count
        # By the processor itself, on its own rendering of the row.
        files = source.get("images", [])
        turns = [
            {"role": turn["role"], "content": as_parts(turn["content"])}
            for turn in source["messages"]
        ]
        text = processor.apply_chat_template(turns)
        images = [Image.open(folder / name) for name in files]
        own = processor(text=[text], images=[images] if images else None, return_tensors="pt")
        # What the template writes after the last answer is left out.
        length = len(row["input_ids"])
        assert own["input_ids"][0, :length].tolist() == row["input_ids"]
        assert processor.tokenizer.decode(own["input_ids"][0, length:]) == "\n"
        ids = set(data.image_tokens.ids)
        assert sum(token in ids for token in row["input_ids"]) == sum(
            row["input_ids"][first:last].count(token)
            for first, last in zip(row["image_starts"], row["image_ends"], strict=True)
            for token in ids
        )
        assert not ids & set(row["labels"])


def as_parts(text) -> list[dict]:
    if isinstance(text, list):
        return text
    pieces = re.split("(<image>)", text)
    return [SEEN if one == "<image>" else said(one) for one in pieces if one]


@pytest.mark.parametrize(
    "family",
    [
        n if n in ("gemma3", "qwen2_vl") else pytest.param(n, marks=pytest.mark.long)
        for n in FAMILIES
    ],
)
def test_a_mixed_batch_has_the_features_of_its_family_and_the_loss_of_its_rows(make, family):
    data = make(ROWS, family)
    data.setup("fit")
    rows = list(data.rows("train"))
    collate, model = data.collator(), tiny_model(family, data.image_tokens.processor).eval()
    batch = collate(rows)
    of_text = {
        "input_ids",
        "attention_mask",
        "labels",
        *data.image_tokens.token_types(batch["input_ids"]),
    }
    assert set(batch) - of_text == FAMILIES[family].image_inputs
    assert batch["labels"][batch["attention_mask"] == 0].eq(IGNORED).all()
    with torch.no_grad():
        whole = model(**batch).loss
        parts = [(model(**collate([row])).loss, row) for row in rows]
    counts = [sum(label != IGNORED for label in row["labels"]) for _, row in parts]
    mean = sum(loss * count for (loss, _), count in zip(parts, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(whole, mean, atol=2e-5, rtol=0)
    # A batch of text alone has no features of images.
    assert set(collate(rows[2:])) == of_text
    # The order of images is that of the rows: others give another loss.
    swapped = [{**rows[0], "images": rows[0]["images"][::-1]}]
    if family != "qwen2_vl":  # Whose images have tokens by their size.
        with torch.no_grad():
            assert model(**collate(swapped)).loss != parts[0][0]


def test_images_come_in_every_way_that_the_field_writes_them(make, folder):
    inside = base64.b64encode((folder / "0.png").read_bytes()).decode()
    address = {"url": f"data:image/png;base64,{inside}"}
    question = said("What?")
    first, second = ((folder / f"{n}.png").read_bytes() for n in range(2))
    turns = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A"},
    ]
    # By an index, as in llava-instruct-mix; the second comes first.
    ordered = user(
        {"type": "image", "text": None, "index": 1},
        {"type": "image", "text": None, "index": 0},
        {"type": "text", "text": "What?", "index": None},
    )

    def asked(*parts, **columns):
        return {"messages": [user(*parts), answer("A")], **columns}

    ways = [
        (asked(SEEN, question, images=["0.png"]), [first]),
        (asked(SEEN, question, image="0.png"), [first]),
        (asked({"type": "image", "image": "0.png"}, question), [first]),
        (asked({"type": "image", "path": "0.png"}, question), [first]),
        (asked({"type": "image", "url": "0.png"}, question), [first]),
        (asked({"type": "image_url", "image_url": address}, question), [first]),
        # Without places of their own, images come before the first question, as with TRL.
        (asked(question, images=["0.png", "1.png"]), [first, second]),
        ({"conversations": turns, "image": "0.png"}, [first]),
        (asked(*ordered["content"], images=["0.png", "1.png"]), [second, first]),
        (asked({"type": "image", "base64": inside}, question), [first]),
        (asked({"type": "image", "bytes": inside}, question), [first]),
        (asked({"type": "image", "source": {"type": "base64", "data": inside}}, question), [first]),
        (asked({"type": "image", "image": (folder / "0.png").as_uri()}, question), [first]),
        (asked(question, images=[{"bytes": inside}, {"path": "1.png"}]), [first, second]),
    ]
    texts = []
    for row, images in ways:
        # A column has one name in a file.
        data = make([row])
        found = prepared(data)[0]
        assert found["images"] == images
        texts.append("".join(span.text for span in data.render_row(found) if not span.trained))
    place = "[image of 30 x 20 pixels, 4 tokens]"
    assert set(texts[:6]) == {f"<|im_start|>user\n{place}What?<|im_end|>\n<|im_start|>assistant\n"}
    other = "[image of 16 x 40 pixels, 4 tokens]"
    assert f"user\n{place}{other}What?" in texts[6]
    assert f"user\n{place}\nWhat?" in texts[7]
    assert f"user\n{other}{place}What?" in texts[8]
    assert set(texts[9:13]) == {texts[0]}
    assert texts[13] == texts[6]


def test_texts_that_are_json_stay_texts(make):
    rows = [
        {"prompt": '{"read": "<image>"}', "completion": '{"total": 3}', "images": ["0.png"]},
        {"prompt": '["<image>"]', "completion": '["cat"]', "images": ["1.png"]},
        {"prompt": json.dumps([user(SEEN)]), "completion": "A", "images": ["2.png"]},
    ]
    data = make(rows)
    found = prepared(data)
    assert [trained(data, row) for row in found] == [
        ['{"total": 3}' + END],
        ['["cat"]' + END],
        ["A" + END],
    ]
    assert "".join(s.text for s in data.render_row(found[0])).startswith(
        '<|im_start|>user\n{"read": "['
    )


def test_long_texts_that_are_not_paths_are_a_problem_of_their_row(make, folder):
    inside = base64.b64encode(b"x" * 900).decode()
    rows = [
        ROWS[1],
        {"messages": [user({"type": "image", "image": inside}), answer("A")]},
        {"messages": [user(said("<image> What?")), answer("A")], "images": ["0.png"]},
        {"messages": [user(SEEN, said("<image> What?")), answer("A")], "images": ["1.png"]},
    ]
    errors = refusal(make(rows))
    assert "row 2 names " in errors
    assert "... (base64 begins with data:;base64,), which cannot be read: File name" in errors
    for row in (3, 4):
        assert (
            f"row {row} has <image> in a text that is a part of a list ('<image> What?'): an image "
            "is a part of its own there"
        ) in errors
    assert len(errors) < 2000


def test_prompts_and_image_columns_of_datasets_are_read(make, folder):
    images = [[content(picture(1))], [content(picture(2)), content(picture(3))]]
    rows = {
        "prompt": ["One <image>?", "Both <image> <image>?"],
        "completion": ["Yes", "No"],
        "images": [[{"bytes": one, "path": None} for one in several] for several in images],
    }
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "images": List(ImageFeature())}
    )
    Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    data = make(folder / "rows.parquet")
    found = prepared(data)
    assert [row["images"] for row in found] == images
    assert data.read().summary["shape"] == "image_prompt"
    assert trained(data, found[1]) == ["No" + END]


def test_all_problems_are_reported_at_once(make, folder):
    (folder / "broken.png").write_bytes(b"no image")
    address = "https://example.org/cat.png"

    def asked(*parts, **columns):
        return {"messages": [user(*parts, said("What?")), answer("A")], **columns}

    rows = [
        ROWS[1],
        asked(SEEN, SEEN, images=["0.png"]),
        asked(SEEN),
        asked(SEEN, images=["absent.png"]),
        asked(SEEN, images=["broken.png"]),
        asked({"type": "image", "url": address}),
        {"messages": [user(said("What?")), answer("<image>")], "images": ["0.png"]},
        asked(said("a \ufffc b")),
        asked(said("a <image> b")),
        asked({"type": "video", "video": "0.mp4"}),
        asked({"type": "image", "index": 1}, images=["0.png"]),
        asked({"type": "image_url", "image_url": "data:image/png;base64,%%"}),
    ]
    errors = refusal(make(rows))
    for wanted in (
        "11 of 12 rows cannot be used",
        "row 2 has 2 places for images in its turns and 1 images in its column",
        "row 3 has 1 places for images in its turns and 0 images in its column",
        "row 4 names ",
        "absent.png', which cannot be read: No such file",
        "row 5 is not an image that Pillow reads",
        f"row 6 names {address!r}; images are read from files",
        "row 7 has an image in turn 2 (assistant), and text alone is learnt",
        "row 8 has the character U+FFFC in a text",
        "row 9 has the special token '<image>' inside its user turn",
        "row 10 turn 1 of messages holds parts that are not text",
        "row 11 has images by the index [1] of 1",
        "row 12 has an image as base64 that cannot be read",
    ):
        assert wanted in errors, errors


def test_a_row_is_never_cut_within_an_image(make):
    rows = [
        {"messages": [user(said("x" * 40), SEEN), answer("A" * 9)], "images": ["0.png"]},
        {"messages": [user(SEEN, said("What?")), answer("B" * 90)], "images": ["1.png"]},
    ]
    # "<|im_start|>user\n", 40 letters, then 4 tokens of the image.
    data = make(rows, max_length=48, over_long="truncate")
    errors = refusal(data)
    assert (
        "row 1 has 73 tokens of 48 allowed, and the end cannot be cut off without a part of an "
        "image (tokens of its images: 4)"
    ) in errors
    assert "1 of 2 rows" in errors
    cut = prepared(make(rows[1:], max_length=48, over_long="truncate"))[0]
    assert (len(cut["input_ids"]), cut["tokens_cut"]) == (48, 71)
    assert cut["image_ends"][0] - cut["image_starts"][0] == 4
    assert "has 119 tokens of 48 allowed" in refusal(make(rows[1:], max_length=48))


@pytest.mark.parametrize("family", ["llava"])
def test_images_are_upright_and_rgb_whatever_they_were(make, folder, family, caplog):
    turned = picture(5, 40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    picture(6, mode="RGBA").save(folder / "clear.png")
    picture(7, mode="L").save(folder / "grey.png")
    frames = [picture(n) for n in (8, 9)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    names = ["turned.jpg", "clear.png", "grey.png", "moving.gif"]
    rows = [
        {"messages": [user(SEEN, said("What?")), answer(name)], "images": [name]} for name in names
    ]
    data = make(rows, family)
    with caplog.at_level(logging.INFO):
        data.prepare_data()
        found = prepared(data)
    assert data.read().summary["conversions"] == {"transparent": 1, "L": 1, "frames": 1}
    assert "1 images (frames) become RGB: only the first of several frames is used" in caplog.text
    assert data.render_row(found[0])[1].text.startswith("[image of 20 x 40 pixels, ")
    upright = Image.open(folder / "turned.jpg").transpose(Image.Transpose.ROTATE_270)
    again = make([{"messages": rows[0]["messages"], "images": ["upright.png"]}], family)
    upright.save(folder / "upright.png")
    other = prepared(again)[0]
    pixels = [data.collator()([row])["pixel_values"] for row in (found[0], other)]
    torch.testing.assert_close(pixels[0], pixels[1])


def test_the_same_question_about_another_image_is_another_row(make, folder):
    asked = {"messages": [user(SEEN, said("What?")), answer("A cat.")]}
    assert len(prepared(make([{**asked, "images": [f"{n}.png"]} for n in (0, 1)]))) == 2
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    same = [{**asked, "images": [name]} for name in ("0.png", "copy.png")]
    assert "row 2 is the same as row 1" in refusal(make(same))


def test_another_image_under_the_same_name_is_prepared_again(make, folder):
    first = prepared(make(ROWS[1:2]))[0]["images"]
    picture(99).save(folder / "3.png")
    assert prepared(make(ROWS[1:2]))[0]["images"] != first


def test_templates_for_texts_get_the_token_and_those_without_images_are_refused(make):
    rows = prepared(data := make(ROWS[1:2], chat_template="plain"))
    text = "".join(span.text for span in data.render_row(rows[0]))
    assert (
        text
        == "### User:\n[image of 50 x 9 pixels, 4 tokens]What is it?\n\n### Assistant:\nA cat."
        + END
    )
    blind = "{% for turn in messages %}{{ turn['role'] }}: Hi{% endfor %}"
    errors = refusal(make(ROWS[1:2], chat_template=blind))
    assert "does not write '<image>' for an image in a user's turn" in errors
    # Only of the first turn: the second image would be left out.
    first = (
        "{{ messages[0]['content'] }}{% for turn in messages %}{{ turn['role'] }}"
        "{% if turn['role'] == 'assistant' %}{{ turn['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    assert "has 3 images in its turns, and the chat template given as chat_template writes 2" in (
        refusal(make(ROWS[:1], chat_template=first))
    )


def test_the_start_token_that_the_processor_adds_is_there_once(make):
    processor = FAMILIES["llava"].processor()
    tokenizer = processor.tokenizer
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    template = (
        "{% for turn in messages %}{{ turn['role'] }}: {% for part in turn['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{{ eos_token if turn['role'] == 'assistant' }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    processor.chat_template = template
    data = make(ROWS[1:2], processor=processor)
    ids = prepared(data)[0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    own = processor(text=["user: <image>What"], images=[[picture(0)]])["input_ids"][0]
    assert ids[: len(own)] == own


def test_a_processor_is_built_of_settings_or_refused(tmp_path):
    FAMILIES["llava"].processor().tokenizer.save_pretrained(tmp_path / "words")
    settings = {
        "processor_class": "LlavaProcessor",
        "special_tokens": ["<picture>"],
        "image_token": "<picture>",
        "patch_size": 8,
        "image_processor": {"image_processor_type": "CLIPImageProcessor"},
    }
    built = load_processor(str(tmp_path / "words"), settings)
    assert built.image_token == "<picture>"
    assert built.image_token_id == len(built.tokenizer) - 1
    with pytest.raises(ConfigError, match="LlavaProcessor has no setting 'patch_sise'"):
        load_processor(str(tmp_path / "words"), {**settings, "patch_sise": 8})
    with pytest.raises(ConfigError, match="processor_class='Llava' is not a processor"):
        load_processor(str(tmp_path / "words"), {**settings, "processor_class": "Llava"})
    with pytest.raises(ConfigError, match="which does not take text and images"):
        load_processor(str(tmp_path / "words"))
    with pytest.raises(ConfigError, match="has no processor_class and no image_processor"):
        ImageTextData("x.jsonl", "words", {"patch_size": 8})


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_package_for_videos_is_installed_next_to_the_torch_that_is_there(tmp_path):
    FAMILIES["qwen2_vl"].processor().save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace("ImagesOnly", "Qwen2VLProcessor"))
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    command = re.escape(f'pip install torchvision "torch=={version("torch")}"')
    with pytest.raises(ConfigError, match=f"needs a package that is missing: .*{command}"):
        load_processor(str(tmp_path))


def test_a_processor_without_a_token_for_images_is_refused():
    processor = FAMILIES["llava"].processor()
    processor.image_token = None
    with pytest.raises(UnsupportedError, match="LlavaProcessor has no token for images"):
        ImageTokens(processor)


class Labelling(LlavaProcessor):
    """A processor that makes labels of a text."""

    def __call__(self, *args, **options):
        found = super().__call__(*args, **options)
        return {**found, "labels": found["input_ids"]}


class Speechless(LlavaProcessor):
    """A processor that needs images."""

    def __call__(self, images=None, **options):
        return {"count": len(images)}


def test_processors_that_are_not_understood_are_refused_before_a_row():
    own = FAMILIES["llava"].processor()
    parts = {"image_processor": own.image_processor, "tokenizer": own.tokenizer}
    with pytest.raises(UnsupportedError, match="Labelling makes labels of a text"):
        ImageTokens(Labelling(**parts))
    with pytest.raises(UnsupportedError, match="Speechless takes no text without images .TypeErr"):
        ImageTokens(Speechless(**parts))


class Tiling(ImageTokens):
    """Writes twice as many tokens for an image that is alone, as LLaVA-OneVision does."""

    def written(self, images):
        found = super().written(images)
        return [one * 2 for one in found] if len(images) == 1 else found


def test_a_prompt_has_the_tokens_of_its_own_images(make):
    data = make(
        [
            {
                "messages": [
                    {"role": "user", "content": "<image> What?"},
                    answer("A"),
                    {"role": "user", "content": "<image> And?"},
                    answer("B"),
                ],
                "images": ["0.png", "1.png"],
            }
        ]
    )
    data._images = Tiling(FAMILIES["llava"].processor())
    (row,) = prepared(data)
    (token,) = data.image_tokens.ids
    assert row["input_ids"].count(token) == 4 * 2
    inputs = data.prompt_of(row)
    assert len(inputs["pixel_values"]) == 1
    assert inputs["input_ids"][0].tolist().count(token) == 4 * 2
    end = row["labels"].index(next(label for label in row["labels"] if label != IGNORED))
    last = row["image_ends"][0]
    assert inputs["input_ids"][0, last + 4 :].tolist() == row["input_ids"][last:end]
