"""Images: what is read, what is refused, and which numbers reach the model."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from lightning_peft.data.images import ImageData
from lightning_peft.data.media_source import ImageSource
from lightning_peft.errors import ConfigError

from .conftest import refusal

Image = pytest.importorskip("PIL.Image")

DIGITS = Path(__file__).parents[2] / "recipes" / "small" / "data" / "digits.parquet"
AS_IT_IS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "image_mean": [0.5, 0.25, 0.0],
    "image_std": [0.5, 0.5, 1.0],
}


def picture(seed: int, width: int = 6, height: int = 5, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, bands) if bands > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def content(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def make(build):
    return partial(build, ImageData, processor=AS_IT_IS, batch_size=4)


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of files: name to image, or to bytes."""

    def folder(files, name="images"):
        for path, what in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(what if isinstance(what, bytes) else content(what))
        return tmp_path / name

    return folder


def classes(count=3, labels=("cat", "dog"), start=0):
    return {
        f"{label}/{i}.png": picture(start + 100 * place + i)
        for place, label in enumerate(labels)
        for i in range(count)
    }


def lines(rows) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def test_all_problems_are_reported_at_once_with_their_rows(make, folder):
    jpeg = content(picture(7, 64, 64), "JPEG")
    files = {
        **classes(),
        "text.png": b"no image at all",
        "short.jpg": jpeg[: len(jpeg) // 2],
        "float.tif": content(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"),
        "copy.png": content(picture(0)),
    }
    rows = [
        {"image": "cat/0.png", "label": "cat"},
        {"image": "cat/9.png", "label": "cat"},
        {"image": "text.png", "label": "cat"},
        {"image": "short.jpg", "label": "dog"},
        {"image": "float.tif", "label": "dog"},
        {"image": "copy.png", "label": "dog"},
        {"image": "dog/0.png", "label": ""},
        {"image": "dog/1.png", "label": "cow"},
        {"label": "dog"},
        {"image": 3, "label": "dog"},
    ]
    path = folder({**files, "rows.jsonl": lines(rows)}) / "rows.jsonl"
    errors = refusal(make(path, labels=["cat", "dog"], validation_share=0))
    for wanted in (
        "9 of 10 rows cannot be used",
        "row 2 names ",
        "9.png', which cannot be read: No such file",
        "row 3 is not an image that Pillow reads",
        "row 4 cannot be read as an image: ",
        "row 5 has pixels of mode 'F'",
        "row 6 is the same as row 1",
        "row 6 has the label 'dog', and another row with this image 'cat'",
        "row 7 has no label",
        "row 8 has the label 'cow', which is none of the 2 that are given",
        "row 9 has no image",
        "row 10 has a number as image",
    ):
        assert wanted in errors, errors


def test_bad_rows_are_skipped_and_kept_without_their_bytes(make, tmp_path):
    rows = [{"image": content(picture(i)), "label": str(i % 2)} for i in range(8)]
    Dataset.from_list([*rows, {"image": b"nothing", "label": "1"}]).to_parquet(
        tmp_path / "a.parquet"
    )
    rejected = tmp_path / "rejected.jsonl"
    data = make(tmp_path / "a.parquet", skip_bad_rows=str(rejected), validation_share=0)
    data.setup("fit")
    assert data.record["splits"]["train"]["rows"] == 8
    (row,) = map(json.loads, rejected.read_text().splitlines())
    assert (row["row"], row["value"]["image"]) == (9, "<7 bytes>")


def test_folders_of_classes_say_label_and_split(make, folder):
    train = {f"train/{name}": image for name, image in classes(labels=("10", "2")).items()}
    held = {f"val/{name}": i for name, i in classes(1, ("10", "2"), start=500).items()}
    path = folder({**train, **held, "train/2/deep/er.png": picture(999), "train/2/notes.txt": b"-"})
    (path / "train" / "3").mkdir()
    data = make(path)
    assert data.labels == ["2", "10"]
    assert {split: rows.num_rows for split, rows in data.read().splits.items()} == {
        "train": 7,
        "validation": 2,
    }
    train_rows = data.read().splits["train"]
    by_file = dict(zip(train_rows["file"], train_rows["label"], strict=True))
    assert by_file["train/2/deep/er.png"] == "2"
    assert by_file["train/10/0.png"] == "10"
    assert data.record["files_left_out"] == ["train/2/notes.txt", "train/3/ (empty)"]


def test_images_without_class_and_leaks_are_reported_by_file(make, folder):
    same = picture(1)
    files = {**classes(), "train/cat/a.png": same, "train/dog/b.png": picture(2)}
    files = {name: image for name, image in files.items() if name.startswith("train/")}
    path = folder({**files, "validation/dog/c.png": same, "train/loose.png": picture(3)})
    errors = refusal(make(path))
    assert (
        "validation/dog/c.png row 4 is for validation and the same as row 1 of train/cat/a.png"
        in errors
    )
    assert "train/loose.png row 3 has no label" in errors


def test_pictures_of_trains_are_not_a_split(make, folder):
    path = folder(classes(labels=("train", "bus")), "vehicles")
    assert make(path, validation_share=0).labels == ["bus", "train"]
    files = {f"train/{name}": image for name, image in classes().items()}
    mixed = folder({**files, "holdout/cat/1.png": picture(70)}, "mixed")
    with pytest.raises(ConfigError, match="classes in train, and next to them holdout"):
        make(mixed).read()


def test_a_limit_takes_some_of_each_class(make, folder):
    data = make(folder(classes(5)), limit=2, validation_share=0)
    assert sorted(data.read().splits["train"]["file"]) == [
        "cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png",
    ]  # fmt: skip


def test_columns_of_the_hub_are_read_as_they_are_kept(make, folder, tmp_path):
    """An Image column is not decoded and encoded again, and a ClassLabel is its name."""
    files = [content(picture(i), "JPEG") for i in range(6)]
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["zebra", "ant"])})
    rows = [{"img": {"bytes": f, "path": None}, "label": i % 2} for i, f in enumerate(files)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub.parquet")
    data = make(tmp_path / "hub.parquet", validation_share=0)
    train = data.read().splits["train"]
    assert train["image"][:] == files
    assert train["label"][:] == ["zebra", "ant"] * 3
    assert data.labels == ["ant", "zebra"]
    named = folder({f"{i}.jpg": file for i, file in enumerate(files)}, "named")
    (named / "list.csv").write_text(
        "file_name,label\n" + "".join(f"{i}.jpg,{('zebra', 'ant')[i % 2]}\n" for i in range(6))
    )
    listed = make(named, validation_share=0)
    assert listed.read().splits["train"]["image"][:] == files
    assert listed.record["files_left_out"] == []


def test_pixels_are_the_files_scaled_and_normalised(make, folder):
    grey, colour = picture(1, mode="L"), picture(2)
    see_through = picture(3, mode="RGBA")
    deep = Image.fromarray(np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000)
    turned = picture(4, 5, 6)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    alpha = np.asarray(see_through)[..., 3:] / 255
    expected = {
        "a": np.repeat(np.asarray(grey)[..., None], 3, -1),
        "b": np.asarray(colour),
        "c": np.asarray(see_through)[..., :3] * alpha + 255 * (1 - alpha),
        "d": np.repeat((np.asarray(deep) // 257)[..., None], 3, -1),
        "e": np.rot90(np.asarray(turned), -1),
    }
    files = {"a": grey, "b": colour, "c": see_through, "d": deep, "e": content(turned, exif=exif)}
    data = make(
        folder({f"{n}/1.png": image for n, image in files.items()}),
        validation_share=0,
        batch_size=5,
    )
    (batch,) = data.train_dataloader()
    mean, std = (np.array(AS_IT_IS[f"image_{name}"]) for name in ("mean", "std"))
    assert batch["pixel_values"].shape == (5, 3, 5, 6)
    for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
        wanted = (
            torch.tensor((expected["abcde"[label]] / 255 - mean) / std).permute(2, 0, 1).float()
        )
        # Blending rounds to whole numbers.
        torch.testing.assert_close(pixels, wanted, atol=0.02 if label == 2 else 1e-6, rtol=0)
    assert data.record["conversions"] == {"L": 1, "transparent": 1, "16 bit": 1}


def test_lossy_conversions_are_logged(make, folder, caplog):
    files = {**classes(), "cat/x.png": picture(50, mode="RGBA"), "cat/y.png": picture(51, mode="L")}
    make(folder(files), validation_share=0).prepare_data()
    assert "1 images (transparent) become RGB: transparent parts become white" in caplog.text


def test_a_changed_image_is_noticed_and_a_moved_folder_is_not(make, folder, tmp_path):
    rows = [{"image": f"{n}", "label": n[:3]} for n in classes()]
    path = folder({**classes(), "rows.jsonl": lines(rows)})
    for data in (path / "rows.jsonl", path):
        key = make(data, validation_share=0).record["key"]
        path.rename(tmp_path / "moved")
        moved = tmp_path / "moved" / data.relative_to(path)
        assert make(moved, validation_share=0).record["key"] == key
        (tmp_path / "moved").rename(path)
        (path / "dog" / "1.png").write_bytes(content(picture(1000 + len(data.name))))
        assert make(data, validation_share=0).record["key"] != key


def test_classes_that_cannot_be_learnt_are_refused(make, folder):
    with pytest.raises(ConfigError, match="All images have the label 'cat'"):
        make(folder(classes(labels=("cat",)), "one"), validation_share=0).setup("fit")
    with pytest.raises(ConfigError, match="No training row has the label cow, so"):
        make(folder(classes()), validation_share=0, labels=["dog", "cow", "cat"]).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a", "b", "a"]}, "holds 'a' more than once"),
        ({"processor": {"size": 8}}, "no image_processor_type"),
    ],
)
def test_arguments_that_cannot_be(options, message, make):
    with pytest.raises(ConfigError, match=message):
        make(DIGITS, **options)


def test_invalid_processors_and_folders_of_images_are_refused(make, folder, tmp_path):
    with pytest.raises(ConfigError, match="processor='nowhere/at-all' is not a folder"):
        _ = make(DIGITS, processor="nowhere/at-all").image_processor
    with pytest.raises(ConfigError, match="processor=.*NoSuchProcessor"):
        _ = make(DIGITS, processor={"image_processor_type": "NoSuchProcessor"}).image_processor
    with pytest.raises(ConfigError, match="holds no images .* In it:\n  - a.heic"):
        make(folder({"a.heic": b"-"}, "none")).read()


def test_without_pillow_it_is_said_what_to_install(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match="pip install pillow"):
        make(DIGITS)


def test_workers_load_the_same_batches(make):
    options = {"limit": 40, "validation_share": 0.3, "batch_size": 3}
    loaders = [make(DIGITS, num_workers=n, **options).val_dataloader() for n in (0, 1)]
    for one, other in zip(*loaders, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_shipped_digits_are_those_of_scikit_learn(make):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    data = make(DIGITS, validation_share=0)
    rows = data.read().splits["train"]
    assert rows["label"][:] == [str(label) for label in digits.target]
    pixels = [np.asarray(Image.open(io.BytesIO(one))) for one in rows["image"]]
    assert np.array_equal(np.stack(pixels), digits.images * 15)
    assert DIGITS.stat().st_size < 300_000


def test_a_column_that_is_something_else_is_not_a_path(make, folder):
    files = {f"{i}.png": content(picture(i)) for i in range(5)}
    rows = [{"image": f"{i}.png", "file_name": ("cat", "dog")[i % 2]} for i in range(4)]
    path = folder({**files, "rows.jsonl": lines(rows)}, "listed")
    data = make(path / "rows.jsonl", columns={"label": "file_name"}, validation_share=0)
    assert data.labels == ["cat", "dog"]


def test_files_that_an_unread_column_names_are_named_as_left_out(folder):
    files = {f"{i}.png": content(picture(i)) for i in range(3)}
    rows = [{"image": "0.png", "label": "a", "file_name": "2.png"},
            {"image": "1.png", "label": "b", "file_name": "2.png"}]  # fmt: skip
    path = folder({**files, "rows.jsonl": lines(rows)}, "named")
    assert ImageSource(str(path)).left_out() == ["2.png"]
