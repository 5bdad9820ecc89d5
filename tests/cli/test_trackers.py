"""Trackers offline: what a recipe logs is read back from their files, where they are installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from trials import QUIET

LOGGERS = {
    "tensorboard": ("TensorBoardLogger", {"save_dir": "board", "name": "", "version": ""}),
    "wandb": ("WandbLogger", {"project": "adapters", "save_dir": ".", "offline": True}),
    "mlflow": ("MLFlowLogger", {"experiment_name": "adapters", "tracking_uri": "sqlite:///ml.db"}),
}
COLUMNS = ["prompt", "expected", "generated"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any, program: Any) -> Path:
    """Where a run of a recipe was, with all trackers that are installed."""
    made = tmp_path_factory.mktemp("tracked")
    chosen = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": dict(arguments)}
        for tracker, (name, arguments) in LOGGERS.items()
        if find_spec(tracker)
    ]
    if not chosen:
        pytest.skip("no tracker is installed: the extras tensorboard, wandb, mlflow")
    settings = {"limit_train_batches": 3, "limit_val_batches": 1, "logger": chosen}
    (made / "tracked.yaml").write_text(yaml.safe_dump({"trainer": settings}))
    given = ["--config=sft-lora", "--config=small/sft", "--config=tracked.yaml", "--run_dir=run"]
    code, _, err = program.run(made, "fit", *given, *QUIET)
    assert code == 0, err[-3000:]
    return made


def recorded(folder: Path) -> tuple[list[float], list[list[Any]]]:
    """Returns the losses of validations while training, and steps with samples, by the record."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    # Lightning does not log the validation before training.
    losses = [line["val_loss"] for line in lines if "val_loss" in line and line["step"]]
    lines = [json.loads(line) for line in (folder / "run/samples.jsonl").read_text().splitlines()]
    samples = [[line[column] for column in ("step", *COLUMNS)] for line in lines]
    assert losses
    assert {0, 3} <= {row[0] for row in samples}
    return losses, samples


def test_tensorboard(folder: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    losses, samples = recorded(folder)
    found = reading.EventAccumulator(str(folder / "board"))
    found.Reload()
    assert [event.value for event in found.Scalars("val_loss")] == pytest.approx(losses)
    events = found.Tensors("samples/text_summary")
    assert [event.step for event in events] == sorted({row[0] for row in samples})
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events}
    assert texts[0].startswith(
        "| prompt | expected | generated |\n| --- | --- | --- |\n| ### User:"
    )
    for step, *cells in samples:
        plain = [cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells]
        assert f"| {' | '.join(plain)} |" in texts[step].splitlines()


def test_weights_and_biases(folder: Path) -> None:
    pytest.importorskip("wandb")
    _, samples = recorded(folder)
    (files,) = (folder / "wandb").glob("offline-run-*/files")
    tables = [json.loads(path.read_text()) for path in files.glob("media/table/*.table.json")]
    assert all(table["columns"] == COLUMNS for table in tables)
    found = sorted(row for table in tables for row in table["data"])
    assert found == sorted(cells for _, *cells in samples)
    # Metrics are in a format of its own, which has names as they are.
    (stored,) = files.parent.glob("*.wandb")
    content = stored.read_bytes()
    assert all(name in content for name in (b"val_loss", b"train_loss", b"learning_rate"))


def test_mlflow(folder: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    losses, samples = recorded(folder)
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'ml.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("adapters").experiment_id])
    history = client.get_metric_history(run.info.run_id, "val_loss")
    assert [metric.value for metric in history] == pytest.approx(losses)
    assert run.data.params["learning_rate"] == "0.005"
    (file,) = folder.glob("mlruns/*/*/artifacts/samples.json")
    assert json.loads(file.read_text()) == {"columns": ["step", *COLUMNS], "data": samples}
