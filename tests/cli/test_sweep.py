"""``lightning-peft sweep``: what is tried, killed and resumed, failed, pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trials import QUIET

from lightning_peft.cli import main
from lightning_peft.engine.loading import quantized_cache, weight_files
from lightning_peft.errors import ConfigError
from lightning_peft.recipe_files import resolved_recipes
from lightning_peft.runs.folder import RunFolder, runs_in
from lightning_peft.runs.reproduction import compare
from lightning_peft.sweeps.settings import (
    SweepSettings,
    Values,
    check_sweep,
    grid_of,
    parse_sets,
    parse_values,
)
from lightning_peft.sweeps.sweep import Sweep

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
# A device that is broken in the first process that trains with it.
BROKEN = KILLED.replace("killing.KillOnce", "breaking.BreakOnce")
BREAKING = """
from importlib import import_module
from pathlib import Path
from lightning_peft.plugin.namespace import namespace_in_use

class BreakOnce(import_module(namespace_in_use()).Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 3 and not Path("broken").exists():
            Path("broken").touch()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
RECIPE = ("sft-qlora", "--config=small/sft", "--config=short.yaml", *QUIET)


def sweep(program: Any, folder: Path, *words: str, code: int = 0) -> dict[str, Any]:
    found, out, err = program.run(folder, "sweep", *words, "--json")
    assert found == code, err[-3000:]
    return json.loads(out) if out else {"err": err}


def test_a_grid_is_trained_and_its_trials_equal_single_runs(
    in_process: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    # A base as small as this one is kept between trials too.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_cache, "SMALLEST", 0)
    monkeypatch.setattr(weight_files, "_SETTLED_NS", -1)
    reads: list[Path] = []
    read = quantized_cache._read
    monkeypatch.setattr(
        quantized_cache, "_read", lambda *given: (reads.append(given[0]), read(*given))[1]
    )
    Path("short.yaml").write_text(SHORT)
    done = in_process("sweep", *RECIPE, "--set", "lr=1e-4,1e30,1e-3", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    first, failed, finished = found["trials"]
    assert [row["values"]["learning_rate"] for row in found["trials"]] == [1e-4, 1e30, 1e-3]
    # The first finds no codes, the second reads them, and the third has them in memory.
    assert len(reads) == 2
    assert (found["metric"], found["mode"]) == ("val_loss", "min")
    assert found["best"] == finished
    assert (failed["state"], failed["val_loss"]) == ("failed", None)
    assert failed["error"].startswith("DivergenceError: ")
    # The trials are runs; the folder of the sweep is not.
    assert {run.path.name for run in runs_in(Path("runs"))} == {
        Path(row["run"]).name for row in (first, failed, finished)
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    words = ("--config=sft-qlora", *RECIPE[1:], "--trainer.devices=1", "--run_dir=single")
    done = in_process("fit", *words, "--model.init_args.learning_rate=1e-3")
    assert done.returncode == 0, done.stderr
    compared = compare(RunFolder(Path(finished["run"])), RunFolder(Path("single")))
    assert compared.identical
    assert compared.steps == 4
    # Nothing is left to do, and nothing is done.
    again = in_process("sweep", "--resume", found["sweep"])
    assert again.stdout.splitlines()[1:] == [
        f"2\t1e+30\t-\t-\t-\t{failed['error']}\t{Path(failed['run']).name}",
        "\t".join(["3", "0.001", f"{finished['val_loss']:.4g}", "4"])
        + f"\t{finished['seconds']:.0f}\tfinished\t{Path(finished['run']).name}",
        f"best: trial 3, {finished['run']}",
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    "tried",
    [
        ("--set=lr=1e-4..1e-2:log", "--set=r=2..4", "--trials=2", "--sampler=random"),
        ("--set=lr=1e-4,1e-3,1e-2",),
    ],
)
def test_a_killed_sweep_goes_on_in_the_middle_of_a_trial(
    program: Any, tmp_path: Path, tried: tuple[str, ...]
) -> None:
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "short.yaml").write_text(SHORT + (KILLED if name == "killed" else ""))
        (tmp_path / name / "killing.py").write_text(KILLING)
    words = (*RECIPE, *tried)
    code, out, _ = program.run(tmp_path / "killed", "sweep", *words, "--json")
    assert (code, out) == (-9, "")
    (folder,) = (tmp_path / "killed" / "runs").glob("*-sweep-*")
    resumed = sweep(program, tmp_path / "killed", "--resume", f"runs/{folder.name}")
    whole = sweep(program, tmp_path / "whole", *words)
    for mine, its in zip(resumed["trials"], whole["trials"], strict=True):
        assert mine["values"] == its["values"]
        assert mine["val_loss"] == its["val_loss"]
        assert mine["steps"] == 4
    assert len(runs_in(tmp_path / "killed" / "runs")) == len(whole["trials"])
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


def begun(sampler: str, trials: int, **more: Any) -> Sweep:
    """Returns a new sweep that is not run."""
    Path("recipe.yaml").touch()
    sets = {"a": "1,2,3"} if sampler == "grid" else {"a": "0.0..1.0"}
    words = ["--config=recipe.yaml", "--trainer.devices=1"]
    given = {"pruner": "none", "seed": 0, "metric": "val_loss", "mode": "min", **more}
    return Sweep.create(
        Path("runs"), SweepSettings("mine", words, sets, sampler, **given, trials=trials)
    )


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_what_was_half_done_comes_first_and_nothing_is_lost(
    sampler: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, stopped = begun(sampler, 3), begun(sampler, 3)
    expected = []
    for value in (1.0, 2.0, 3.0):
        trial = whole._ask(whole._done())
        trial.set_user_attr("run", f"run-{value}")
        expected.append(trial.params)
        whole._study.tell(trial, value)
    assert len({tuple(params.items()) for params in expected}) == 3
    for number, value in enumerate((1.0, 2.0, 3.0)):
        # One process ends before a trial has a folder, the next one in the middle of it.
        Sweep(stopped.folder)._ask(stopped._done())
        trial = Sweep(stopped.folder)._ask(stopped._done())
        trial.set_user_attr("run", f"run-{value}")
        again = Sweep(stopped.folder)
        trial = again._ask(again._done())
        assert trial.user_attrs == {"run": f"run-{value}"}
        assert trial.params == expected[number]
        again._study.tell(trial, value)
    assert [one.value for one in Sweep(stopped.folder)._done()] == [1.0, 2.0, 3.0]


def test_neighbouring_seeds_try_other_values(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tried = []
    for seed in range(3):
        sweep = begun("random", 3, seed=seed)
        for value in range(3):
            trial = sweep._ask(sweep._done())
            sweep._study.tell(trial, float(value))
            tried.append(trial.params["a"])
    assert len(set(tried)) == 9


def test_values_that_came_to_nothing_are_not_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    made = begun("random", 4)
    for run, state, more in (
        ("worse", "PRUNED", {"intermediate_values": {2: 5.0}, "value": 5.0}),
        ("failed", "FAIL", {}),
    ):
        error = {"error": "DivergenceError: x"} if state == "FAIL" else {}
        params = {"a": 0.25 if error else 0.75}
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState[state],
            params=params,
            distributions=made._distributions,
            user_attrs={"run": run, **error},
            **more,
        )
        made._study.add_trial(trial)
        made._study.enqueue_trial(params)
    lines: list[str] = []
    assert made.run(lines.append)
    assert [line.partition(": ")[2] for line in lines] == [
        *("the same values as before, in worse", "the same values as before, in failed")
    ]
    assert [(row["state"], row["val_loss"], row["error"]) for row in made.rows()] == [
        *(("pruned", 5.0, None), ("failed", None, "DivergenceError: x"))
    ]


def test_a_sweep_is_found_from_another_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder = begun("grid", 3).folder.resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Sweep(folder).settings.words == [
        *(f"--config={folder / 'recipe.yaml'}", "--trainer.devices=1")
    ]


@pytest.mark.long
def test_a_broken_device_fails_no_trial(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("short.yaml").write_text(SHORT + BROKEN)
    Path("breaking.py").write_text(BREAKING)
    with resolved_recipes([f"--config={RECIPE[0]}", *RECIPE[1:]]) as words:
        settings = check_sweep("mine", words, ["lr=1e-4,1e-3"], None, None)
        made = Sweep.create(Path("runs"), settings)
    # A trial before it, so that this is not the first of all.
    made._study.add_trial(
        optuna.trial.create_trial(
            params={"model.init_args.learning_rate": "1e-4"},
            distributions=made._distributions,
            value=1.0,
            user_attrs={"run": "earlier"},
        )
    )
    with pytest.raises(RuntimeError, match="CUDA error"):
        made.run(print)
    again = Sweep(made.folder)
    assert again.run(print)
    assert [row["state"] for row in again.rows()] == ["finished", "finished"]
    assert len(runs_in(Path("runs"))) == 1


def test_a_pruner_ends_a_trial_that_is_worse(tmp_path: Path, monkeypatch: Any) -> None:
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
    assert (
        "\n  - trainer.strategy.init_args.r=0: Cannot instantiate the config: These LoRA settings "
        "cannot work:\n    - r=0: the rank is a positive integer\n"
    ) in message
    # Keys without init_args, and of callbacks, which are a list.
    words = ("--set=trainer.strategy.r=0,4", "--set=model.learning_rate=1..2", "--trials=3")
    assert main(["sweep", *recipe, *words, "--set=trainer.callbacks.init_args.nothing=1..4"]) == 2
    message = capsys.readouterr().err
    for part in ("init_args.r=0", "where fractions are possible, write 1.0..2.0", "nothing=1"):
        assert part in message
    assert "init_args.r=4" not in message
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
        (("--resume=x", "--pruner=median"), "takes no recipe, values or other options"),
        (("--resume=x", "--seed=0"), "takes no recipe, values or other options"),
        (("--resume=x", "--runs=runs"), "takes no recipe, values or other options"),
        (("sft-qlora", "--set=r=1,2", "--seed=-1"), "--seed -1 is not a seed"),
        (("--resume=x",), "is not the folder of a sweep"),
        (("sft-qlora", "--set=r=1", "--runs=x", "--folder=y"), "--runs and --folder exclude"),
    ],
)
def test_refused(words: tuple[str, ...], message: str, capsys: Any) -> None:
    assert main(["sweep", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_folder_of_a_run_or_sweep_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    settings = SweepSettings("mine", [], {"r": "8"}, "grid", "none", 1, 0, "val_loss", "min")
    files = {
        "status": "status.json",
        "checkpoint": "checkpoints/last.ckpt",
        "sweep": "sweep.json",
    }
    for name, file in files.items():
        folder = tmp_path / name
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
        with pytest.raises(ConfigError, match="is the folder of a (run|sweep)"):
            Sweep.create(tmp_path, settings, folder)
        assert [one for one in folder.rglob("*") if one.is_file()] == [folder / file]
    # As the page prepares one.
    folder = RunFolder.at(tmp_path / "new")
    folder.recipe.touch()
    assert Sweep.create(tmp_path, settings, folder.path).folder == folder.path


def test_resumed_where_it_was_begun(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    settings = SweepSettings("mine", [], {"r": "8"}, "grid", "none", 1, 0, "val_loss", "min")
    folder = Sweep.create(tmp_path / "runs", settings).folder
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["sweep", f"--resume={folder}"]) == 2
    assert f"cd {settings.directory}" in capsys.readouterr().err


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
        "trainer": {
            **{"max_epochs": 1, "devices": 1, "num_nodes": 1},
            "strategy": {"class_path": "QLoRAStrategy", "init_args": {"r": 8}},
        },
    }
    words = ["r=1", "lr=2", "max_epochs=3", "data.init_args.seed=4", "seed_everything=1,2"]
    assert list(parse_sets(words, config)) == [
        *("trainer.strategy.init_args.r", "model.init_args.learning_rate", "trainer.max_epochs"),
        *("data.init_args.seed", "seed_everything"),
    ]
    with pytest.raises(ConfigError, match="several keys: model.init_args.seed, data.init_args"):
        parse_sets(["seed=1"], config)
    assert list(
        parse_sets(["trainer.strategy.r=1", "trainer.strategy.class_path=A,B"], config)
    ) == [*("trainer.strategy.init_args.r", "trainer.strategy.class_path")]
    with pytest.raises(ConfigError, match="init_args.r is there twice"):
        parse_sets(["r=8", "trainer.strategy.r=16"], config)
    for name in ("trainer.devices", "devices", "num_nodes", "run_dir"):
        with pytest.raises(ConfigError, match="is the same for all trials"):
            parse_sets([f"{name}=1,2"], config)
