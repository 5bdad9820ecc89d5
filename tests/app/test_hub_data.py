"""Configurations and splits of data sets of the hub that are on this machine."""

from __future__ import annotations

import json

import pytest

from gradio_app.pages.new.data import _hub_menus
from gradio_app.recipe.hub_data import known_data_sets, known_splits
from tests.app.browsing import open_new_run

CARD = """---
configs:
- config_name: de
  data_files:
  - {split: train, path: de/train-*}
  - {split: test, path: de/test-*}
dataset_info:
- config_name: fr
  splits: [{name: train, num_examples: 3}]
---
# Orders ---
"""


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Folders as the libraries write them: a card that was fetched, and rows that were prepared."""
    hub, prepared = tmp_path / "hub", tmp_path / "datasets"
    for name, text in (("me--orders", CARD), ("me--bare", "no head"), ("me--odd", "---\n[\n---")):
        folder = hub / f"datasets--{name}" / "snapshots" / "0a"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(text)
    folder = prepared / "me___orders" / "de" / "0.0.0" / "1f"
    folder.mkdir(parents=True)
    info = {"config_name": "de", "splits": {"train": {}, "extra": {}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    env = {"HF_HUB_CACHE": str(hub), "HF_DATASETS_CACHE": str(prepared)}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return env


def test_splits_are_those_of_the_card_and_of_what_was_prepared(caches):
    assert known_data_sets() == ["me/bare", "me/odd", "me/orders"]
    assert known_splits("me/orders") == {"de": ["train", "test", "extra"], "fr": ["train"]}
    for name in ("me/bare", "me/odd", "me/absent"):
        assert known_splits(name) == {}
    menus = [one["choices"] for one in _hub_menus("me/orders", "fr")]
    assert menus == [["de", "fr"], ["train"]]
    assert _hub_menus("../x", None)[0]["choices"] == []


@pytest.mark.long
def test_the_menus_of_a_data_set_follow_its_name(visit, serve, caches):
    page = open_new_run(visit, serve(trainer="fake", env=caches), "#data")
    page.locator("#data-hub > button").click()
    page.locator("#data-hub-name input").click()
    page.get_by_role("option", name="me/orders").click()
    page.locator("#data-hub-config input").click()
    page.get_by_role("option", name="de", exact=True).click()
    page.locator("#data-hub-split input").click()
    page.get_by_role("option", name="extra").wait_for()
    assert page.get_by_role("option").all_inner_texts() == ["train", "test", "extra"]
