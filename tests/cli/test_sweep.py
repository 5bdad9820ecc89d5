"""``lightning-peft sweep``: what is tried, killed and resumed, failed, pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trials import QUIET

from lightning_peft.cli import main
from lightning_peft.errors import ConfigError
from lightning_peft.runs.folder import RunFolder, runs_in
from lightning_peft.runs.reproduction import compare
from lightning_peft.sweeps.values import Values, grid_of, parse_sets, parse_values

optuna = pytest.importorskip("optuna")

SHORT = """
trainer:
  limit_train_batches: 4
  limit_val_batches: 1
  num_sanity_val_steps: 0
  callbacks:
    - class_path: lightning_peft.tasks.BestCheckpoint
      init_args: {save_every: 1}
"""
# Ends the process in the middle of the second trial, as a power cut does.
KILLED = """
    - class_path: killing.KillOnce
"""
KILLING = """
import os, signal
from pathlib import Path
from lightning.pytorch import Callback

class KillOnce(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 3 and len(list(Path("runs").glob("*/result.json"))) == 1:
            if not Path("killed").exists():
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
"""
RECIPE = ("sft-qlora", "--config=small/sft", "--config=short.yaml", *QUIET)


def sweep(program: Any, folder: Path, *words: str, code: int = 0) -> dict[str, Any]:
    found, out, err = program.run(folder, "sweep", *words, "--json")
    assert found == code, err[-3000:]
    return json.loads(out) if out else {"err": err}


def test_a_grid_is_trained_and_its_trials_equal_single_runs(in_process: Any) -> None:
    Path("short.yaml").write_text(SHORT)
    done = in_process("sweep", *RECIPE, "--set", "lr=1e-3,1e30", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    finished, failed = found["trials"]
    assert [row["values"] for row in (finished, failed)] == [
        *({"learning_rate": 1e-3}, {"learning_rate": 1e30})
    ]
    assert (found["metric"], found["mode"]) == ("val_loss", "min")
    assert found["best"] == finished
    assert (failed["state"], failed["val_loss"]) == ("failed", None)
    assert failed["error"].startswith("DivergenceError: ")
    # The trials are runs; the folder of the sweep is not.
    assert {run.path.name for run in runs_in(Path("runs"))} == {
        Path(row["run"]).name for row in (finished, failed)
    }
    words = ("--config=sft-qlora", *RECIPE[1:], "--trainer.devices=1", "--run_dir=single")
    done = in_process("fit", *words, "--model.init_args.learning_rate=1e-3")
    assert done.returncode == 0, done.stderr
    compared = compare(RunFolder(Path(finished["run"])), RunFolder(Path("single")))
    assert compared.identical
    assert compared.steps == 4
    # Nothing is left to do, and nothing is done.
    again = in_process("sweep", "--resume", found["sweep"])
    assert again.stdout.splitlines() == [
        "\t".join(["1", "0.001", f"{finished['val_loss']:.4g}", "4"])
        + f"\t{finished['seconds']:.0f}\tfinished\t{Path(finished['run']).name}",
        f"2\t1e+30\t-\t-\t-\t{failed['error']}\t{Path(failed['run']).name}",
        f"best: trial 1, {finished['run']}",
    ]


@pytest.mark.long
def test_a_killed_sweep_goes_on_in_the_middle_of_a_trial(program: Any, tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "short.yaml").write_text(SHORT + (KILLED if name == "killed" else ""))
        (tmp_path / name / "killing.py").write_text(KILLING)
    words = (*RECIPE, "--set=lr=1e-4..1e-2:log", "--set=r=2..4", "--trials=2", "--sampler=random")
    code, out, _ = program.run(tmp_path / "killed", "sweep", *words, "--json")
    assert (code, out) == (-9, "")
    (folder,) = (tmp_path / "killed" / "runs").glob("*-sweep-*")
    resumed = sweep(program, tmp_path / "killed", "--resume", f"runs/{folder.name}")
    whole = sweep(program, tmp_path / "whole", *words)
    for mine, its in zip(resumed["trials"], whole["trials"], strict=True):
        assert mine["values"] == its["values"]
        assert mine["val_loss"] == its["val_loss"]
        assert mine["steps"] == 4
    assert len(runs_in(tmp_path / "killed" / "runs")) == 2
    events = RunFolder(tmp_path / "killed" / resumed["trials"][1]["run"])
    assert [row["text"] for row in events.rows(events.events)][-1] == "Training starts at step 2."
    # Nothing is left to do, and nothing is done.
    assert sweep(program, tmp_path / "killed", "--resume", f"runs/{folder.name}") == resumed


@pytest.mark.long
def test_a_recipe_that_is_wrong_ends_the_sweep(in_process: Any) -> None:
    Path("short.yaml").write_text(SHORT)
    done = in_process("sweep", *RECIPE, "--set=target_modules=[nothing],all-linear")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nothing" in done.stderr
    assert "Go on: lightning-peft sweep --resume runs/" in done.stderr
    assert len(runs_in(Path("runs"))) == 1


def test_a_pruner_ends_a_trial_that_is_worse(tmp_path: Path, monkeypatch: Any) -> None:
    from lightning_peft.recipe_files import resolved_recipes
    from lightning_peft.sweeps.sweep import Sweep, check_sweep

    monkeypatch.chdir(tmp_path)
    Path("short.yaml").write_text(SHORT + "  val_check_interval: 2\n")
    with resolved_recipes([f"--config={RECIPE[0]}", *RECIPE[1:]]) as words:
        settings = check_sweep("mine", words, ["lr=1e-9,1e-3"], "random", 6, "median")
        made = Sweep.create(Path("runs"), settings)
    key = "model.init_args.learning_rate"
    for value in (1.0, 1.1, 1.2, 1.3, 1.4):
        made._study.add_trial(
            optuna.trial.create_trial(
                params={key: "1e-3"},
                distributions=made._distributions,
                values=[value],
                intermediate_values={2: value, 4: value},
                user_attrs={"run": f"earlier-{value}"},
            )
        )
    made._study.enqueue_trial({key: "1e-9"})
    lines: list[str] = []
    assert made.run(lines.append)
    row = made.rows()[-1]
    assert row["state"] == "pruned"
    assert row["steps"] == 2
    assert row["val_loss"] > 1.4
    assert lines[-1].endswith(", pruned")
    assert made.best()["val_loss"] == 1.0


def test_everything_that_is_wrong_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = ("sft-qlora", "--config=small/sft")
    assert main(["sweep", *recipe, "--set=r=8,16,8", "--set=rr=1", "--set=lr=2..1"]) == 2
    message = capsys.readouterr().err
    assert "--set r=8,16,8: 8 is there twice" in message
    assert "no key 'rr'; near names: r" in message
    assert "does not begin with the smaller number" in message
    words = ("--set=r=8,x,0", "--set=lr=1e-4,fast", "--set=batch_size=many")
    assert main(["sweep", *recipe, *words]) == 2
    message = capsys.readouterr().err
    for part in ("init_args.r=x", "init_args.r=0", "learning_rate=fast", "batch_size=many"):
        assert part in message
    assert "init_args.r=8" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name a recipe first"),
        (("sft-qlora",), "Nothing is tried"),
        (("sft-qlora", "--set=lr=1..2"), "takes --trials N"),
        (("sft-qlora", "--set=lr=1..2", "--sampler=grid"), "A grid takes values and no range"),
        (("sft-qlora", "--set=r=1,2", "--sampler=grid", "--trials=3"), "has 2 combinations"),
        (("sft-qlora", "--set=r=1,2", "--trainer.devices=2"), "on one device"),
        (("sft-qlora", "--set=r=1,2", "--trainer.callbacks=[]"), "BestCheckpoint monitors"),
        (("sft-qlora", "--set=r=1,2", "--run_dir=x"), "there is no option --run_dir"),
        (("--resume=x", "--set=r=1"), "takes no recipe, values or other options"),
        (("--resume=x",), "is not the folder of a sweep"),
    ],
)
def test_refused(words: tuple[str, ...], message: str, capsys: Any) -> None:
    assert main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err


def test_values() -> None:
    assert parse_values("8, 16") == Values(("8", "16"))
    assert parse_values("[q, v],{a: 1, b: 2},'x,y'") == Values(("[q, v]", "{a: 1, b: 2}", "'x,y'"))
    assert parse_values("1e-5..1e-3:log") == Values(("1e-5", "1e-3"), True, True)
    whole = parse_values("4..64").distribution()
    assert isinstance(whole, optuna.distributions.IntDistribution)
    assert (whole.low, whole.high) == (4, 64)
    assert isinstance(parse_values("0..1.0").distribution(), optuna.distributions.FloatDistribution)
    for wrong in ("8,,16", "8,", "[a,b", "0..1:log", "1..2:linear"):
        with pytest.raises(ConfigError):
            parse_values(wrong)
    grid = grid_of({"a": Values(("1", "2")), "b": Values(("3", "4"))})
    assert [tuple(one.values()) for one in grid] == [
        *(("1", "3"), ("1", "4"), ("2", "3"), ("2", "4"))
    ]


def test_names() -> None:
    config = {
        "model": {"init_args": {"learning_rate": 1, "seed": 0}},
        "data": {"init_args": {"seed": 0}},
        "trainer": {"max_epochs": 1, "strategy": {"init_args": {"r": 8}}},
    }
    words = ["r=1", "lr=2", "max_epochs=3", "data.init_args.seed=4", "seed_everything=1,2"]
    assert list(parse_sets(words, config)) == [
        *("trainer.strategy.init_args.r", "model.init_args.learning_rate", "trainer.max_epochs"),
        *("data.init_args.seed", "seed_everything"),
    ]
    with pytest.raises(ConfigError, match="several keys: model.init_args.seed, data.init_args"):
        parse_sets(["seed=1"], config)
    with pytest.raises(ConfigError, match="is the same for all trials"):
        parse_sets(["trainer.devices=1,2"], config)
