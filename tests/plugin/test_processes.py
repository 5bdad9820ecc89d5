"""Two real processes with gloo; and processes that are killed while they save."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from modules import differing, loader, outputs, saver, strategy, task, trainer, weights
from two_processes import ROOT

from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, program):
    """What the two processes left behind, of which Lightning starts the second one."""
    made = tmp_path_factory.mktemp("processes")
    (made / "printed").write_text(program.run_script(made, HERE / "two_processes.py", str(made)))
    return made


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["strategy", "callback"])
def test_ranks_train_one_model(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert first["world_size"] == second["world_size"] == 2
    assert first["sampler"] == "DistributedSampler"
    assert not first["hook"]
    assert not differing(first["weights"], second["weights"])
    assert first["losses"] != second["losses"]


def test_a_layer_that_the_loss_does_not_reach(ranks):
    for rank in ranks:
        message, steps = rank["idle"]
        assert message.startswith(
            "In the step before, the loss did not reach all trainable parameters"
        )
        assert "\n  - model.spare.lora_A.default.weight\n  - model.spare.lora_B.default" in message
        assert "ddp_kwargs={'find_unused_parameters': True}" in message
        assert "ddp_find_unused_parameters_true" not in message
        assert steps == 1
        assert rank["idle allowed"] == ("", 3)


@pytest.mark.parametrize("case", ["asked", "step", "backward", "uneven", "first", "twice"])
def test_a_process_without_memory_has_all_take_smaller_batches(case, ranks):
    for rank in ranks:
        found, short = rank["short"][case], rank["short"]
        expected = short.get(f"ddp {case}", short["ddp"])
        # Of 22 rows in each process eleven batches, of which the last three are a step.
        count = {"uneven": 11, "twice": 15}.get(case, 12)
        assert found["rows"][-count:] == expected["rows"] == [2] * count
        assert not differing(found["weights"], expected["weights"])
        assert found["means"] == expected["means"]


def test_processes_without_memory_that_all_end(ranks):
    for rank in ranks:
        assert "a smaller batch does not help: the batch is one row" in rank["short"]["one row"]
        assert (
            "training_step, or its backward pass, exchanges something"
            in (rank["short"]["unserved"])
        )
        assert "ddp_kwargs={'static_graph': True}: DDP learns" in rank["short"]["static"]
        assert "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in rank["short"]["stale"]


@pytest.mark.parametrize("sharding", [None, "fsdp2"])
def test_a_frozen_layer_that_the_checkpoint_leaves_out(sharding, ranks, folder):
    file = torch.load(folder / f"guided-{sharding}.ckpt", weights_only=True)
    assert not any(name.startswith("guide") for name in file["state_dict"])
    assert [*file[CHECKPOINT_KEY]["excluded"]] == ["guide.weight", "guide.bias"]
    whole, again, other = zip(*(rank["guided"][sharding == "fsdp2"] for rank in ranks), strict=True)
    for (losses, weight), (rest, same) in zip(whole, again, strict=True):
        assert len(losses) == len(rest) == 2
        assert torch.equal(weight, same)
    assert all("- guide.weight\n  - guide.bias\nNo checkpoint" in message for message in other)


def test_by_default_what_differs_is_in_the_file(ranks):
    assert [rank["left out"] for rank in ranks] == [["guide.weight"]] * 2


def test_the_table_is_printed_by_one_rank(folder):
    # Two runs of the script print it.
    assert (folder / "printed").read_text().count("trainable ") == 2


def test_strategy_and_callback_do_the_same(ranks):
    for rank in ranks:
        assert rank["strategy"]["losses"] == rank["callback"]["losses"]
        assert not differing(rank["strategy"]["weights"], rank["callback"]["weights"])


def test_two_processes_equal_one_on_the_same_global_batch(ranks, tmp_path):
    torch.manual_seed(7)
    module = task(ROOT, kind="llama")
    run = trainer(tmp_path, "qlora", ROOT, enable_checkpointing=False)
    torch.manual_seed(8)
    run.fit(module, loader("llama"))
    both = torch.tensor([rank["strategy"]["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(both, torch.tensor(module.losses), rtol=0, atol=1e-4)
    expected = ranks[0]["strategy"]["weights"]
    for name, value in weights(module).items():
        if ".lora_" in name:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-3)
        elif value.dtype == torch.uint8:
            assert torch.equal(value, expected[name])


def test_a_checkpoint_of_two_processes_loads_in_one(ranks, folder, tmp_path):
    module = task(ROOT, kind="llama")
    run = trainer(tmp_path, "qlora", ROOT)
    results = run.validate(
        module, loader("llama"), ckpt_path=folder / "callback.ckpt", verbose=False
    )
    halves = [rank["callback"]["validated"][0]["val_loss"] for rank in ranks]
    assert results[0]["val_loss"] == pytest.approx(sum(halves) / 2, abs=1e-5)
    names = [name for name in ranks[0]["callback"]["weights"] if ".lora_" in name]
    expected = {name: ranks[0]["callback"]["weights"][name] for name in names}
    assert not differing({name: weights(module)[name] for name in names}, expected)
    content = torch.load(folder / "strategy.ckpt", weights_only=True)
    assert len(content[CHECKPOINT_KEY]["processes"]) == 2
    # It can be trained on, with other random numbers.
    fresh = task(ROOT, kind="llama")
    more = trainer(tmp_path, strategy("qlora", ROOT), ROOT, max_epochs=2)
    more.fit(fresh, loader("llama"), ckpt_path=folder / "strategy.ckpt")
    assert fresh.losses
    assert not torch.equal(outputs(fresh, "llama"), outputs(module, "llama"))


def test_adapters_begin_again_with_the_same_values_in_both_processes(ranks):
    first, second = (rank["restarted"] for rank in ranks)
    # Their generators were seeded with other numbers.
    assert first["restarts"] == second["restarts"] == 2
    assert not differing(first["weights"], second["weights"])
    changed = differing(first["weights"], weights(task(ROOT, kind="llama")))
    assert "model.model.layers.0.self_attn.q_proj.weight" in changed


def test_resume_is_exact_in_both_processes(ranks):
    for rank in ranks:
        assert len(rank["resumed"]["losses"]) == 8
        assert rank["resumed"]["losses"] == rank["straight"]["losses"][4:]
        assert not differing(rank["resumed"]["weights"], rank["straight"]["weights"])


def test_processes_start_from_the_same_data(ranks):
    first, second = (rank["made from data"] for rank in ranks)
    assert not differing(first, second)
    for first, second in zip(*(rank["made by inject"] for rank in ranks), strict=True):
        assert not differing(first, second)
    for rank in ranks:
        assert "has no batches in one of the processes" in rank["made from none"]


def test_gradient_checkpointing_changes_no_number_in_two_processes(ranks):
    for rank in ranks:
        assert len(rank["kept"]["losses"]) == 6
        assert rank["checkpointed"]["losses"] == rank["kept"]["losses"]
        assert not differing(rank["checkpointed"]["weights"], rank["kept"]["weights"])
    assert ranks[0]["kept"]["losses"] != ranks[1]["kept"]["losses"]


def test_a_record_that_does_not_hold_everywhere_is_decided_again_by_all(ranks):
    for rank in ranks:
        recompute, reason = rank["recorded"]
        assert not recompute
        assert reason.startswith("all activations take less than")


def test_one_process_trains_alone_after_a_run_of_both(ranks):
    assert len(ranks[0]["alone"]) == 12


def test_another_base_on_one_rank_is_found_by_all(ranks):
    for rank in ranks:
        assert "Ranks [1] have another base model than rank 0" in rank["other base"]
        assert "model.model.layers.1.mlp.up_proj.weight" in rank["other base"]


def test_a_failed_verification_stops_all_ranks(ranks):
    assert ranks[0]["verification"] == (
        "Adapter verification failed on ranks [1]; see the errors of those ranks."
    )
    assert "called without effect in eval mode" in ranks[1]["verification"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_processes import fit_and_save

folder, count = Path({folder!r}), 0
rename = os.replace

def replace(source, target):
    global count
    if Path(target).match({pattern!r}):
        count += 1
    if count == {at}:
        if {half} and Path(source).is_file():
            os.truncate(source, Path(source).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.replace = replace
fit_and_save(folder, {method!r})
"""
# Each point of saving writes two checkpoints and their folders; the second point is not survived.
KILLS = {
    "half a file": ({"pattern": "*.ckpt", "at": 3, "half": True, "method": "qlora"}, ["step=4"]),
    "not renamed": ({"pattern": "*.ckpt", "at": 3, "half": False, "method": "lora"}, ["step=4"]),
    "only the folder": (
        {"pattern": "adapters/*", "at": 3, "half": False, "method": "qlora"},
        ["step=4"],
    ),
    "before last": (
        {"pattern": "*.ckpt", "at": 4, "half": True, "method": "lora"},
        ["step=4", "step=8"],
    ),
}


def fit_and_save(folder, method, ckpt_path=None):
    """Trains for two epochs of six steps and saves after every fourth; returns the module."""
    torch.manual_seed(5 if ckpt_path is None else 1000)
    module = task(ROOT, kind="llama")
    points = saver(
        ROOT, folder, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True
    )
    run = trainer(
        folder / "root",
        strategy(method, ROOT, lora_dropout=0.3),
        ROOT,
        max_epochs=2,
        callbacks=[points],
    )
    run.fit(module, loader("llama", shuffle=True), ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """By method, an uninterrupted run and its folder."""
    folders = {method: tmp_path_factory.mktemp(method) for method in ("lora", "qlora")}
    return {method: (fit_and_save(folder, method), folder) for method, folder in folders.items()}


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_while_saving_leaves_whole_checkpoints(name, straight, program, tmp_path):
    settings, whole = KILLS[name]
    folder, (expected, complete) = tmp_path / "killed", straight[settings["method"]]
    killed = KILLED.format(folder=str(folder), paths=PATHS, **settings)
    code, out, err = program.run(tmp_path, code=killed)
    assert code == -9, out + err
    assert sorted(path.stem for path in folder.rglob("*.ckpt")) == ["last", *whole]
    assert list(folder.rglob(".incomplete-*"))
    resumed = fit_and_save(folder, settings["method"], ckpt_path="last")
    assert len(resumed.losses) == 8
    assert resumed.losses == expected.losses[4:]
    assert not differing(weights(resumed), weights(expected))
    # The run that went on wrote the same files and left nothing unfinished.
    assert not list(folder.rglob(".incomplete-*"))
    for path in complete.glob("*.ckpt"):
        first, second = (torch.load(p, weights_only=True) for p in (path, folder / path.name))
        assert not differing(first["state_dict"], second["state_dict"])
        assert (folder / "adapters" / path.stem / "adapter_model.safetensors").is_file()


@pytest.mark.long
def test_tasks_of_slurm_are_requeued_and_continue(program, tmp_path):
    """SIGUSR1 to both, as `--signal` of a job sends it."""
    program.run_script(tmp_path, HERE / "slurm_processes.py", str(tmp_path), ranks=2)
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 4242"] * 2
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"rank{rank}.pt").values():
            assert found["saved"] == ["hpc_ckpt_1.ckpt"]
            rest, whole = found["losses"]
            assert len(rest) == 8
            assert rest == whole[2:]
            assert not differing(*found["weights"])
