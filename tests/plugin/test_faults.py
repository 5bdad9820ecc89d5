"""Full disks, lost folders, cut files, spoilt weights, ended processes: what is kept, and said."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from modules import ROOTS, differing, lightning, loader, saver, strategy, task, trainer, weights
from torch.utils.data import DataLoader, Dataset

from lightning_peft.errors import ConfigError, DivergenceError, LightningPeftError, StorageError
from lightning_peft.file_errors import write_problem
from lightning_peft.plugin.checkpoint_io import adapter_folder, write_adapter_folder
from lightning_peft.runs.folder import RunFolder
from lightning_peft.runs.session import RunSession, _choose_checkpoint

ROOT = ROOTS[0]
HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
CYCLES = "import sys; sys.path[:0] = {paths!r}; import fault_cycles; fault_cycles.main({words!r})"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "words",
    [
        ["--one=1", "--two=0", "--seed=6"],
        pytest.param(["--one=4", "--two=0"], marks=pytest.mark.long),
        pytest.param(["--one=0", "--two=2"], marks=pytest.mark.long),
    ],
)
def test_runs_that_are_killed_end_as_if_they_were_not(words, program, tmp_path):
    """More of them: `make test-faults`."""
    code, out, err = program.run(tmp_path, code=CYCLES.format(paths=PATHS, words=words))
    assert code == 0, err[-5000:]
    done = json.loads(out.splitlines()[-1])
    assert f"={done['cycles']}" in words[0] + words[1]
    assert done["killed"] >= 1
    assert done["different"] == 0


def test_a_run_that_is_resumed_at_an_epochs_end_is_resumed_again(tmp_path):
    """Of the second epoch, the checkpoint of the second session holds three of six steps."""

    def fit(name, checkpoint=None):
        torch.manual_seed(5 if checkpoint is None else 6)
        module = task(kind="residuals")
        given = {"filename": "{step}", "every_n_train_steps": 3, "save_top_k": -1}
        points = saver(ROOT, tmp_path / name, **given)
        ours = strategy(target_modules=["up", "down"])
        run = trainer(tmp_path, ours, max_epochs=2, callbacks=[points])
        run.fit(module, loader("residuals", shuffle=True), ckpt_path=checkpoint)
        return module

    straight = fit("straight")
    first = fit("first", tmp_path / "straight" / "step=6.ckpt")
    second = fit("second", tmp_path / "first" / "step=9.ckpt")
    assert first.losses == straight.losses[6:]
    assert second.losses == straight.losses[9:]
    assert len(second.losses) == 3
    assert not differing(weights(second), weights(straight))


class Limits(lightning(ROOT).Callback):
    """Saves after each step, at one of them with room for the adapter, and not for the rest."""

    def __init__(self, folder, at):
        self.folder, self.at = folder, at

    def on_train_batch_end(self, trainer, *given):
        step = trainer.global_step
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if step == self.at:
            adapter = self.folder / "adapters" / "1" / "adapter_model.safetensors"
            resource.setrlimit(resource.RLIMIT_FSIZE, (adapter.stat().st_size, hard))
        try:
            trainer.save_checkpoint(self.folder / f"{step}.ckpt")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_the_disk_does_not_take(tmp_path):
    def fit(*callbacks, checkpoint=None):
        torch.manual_seed(5 if checkpoint is None else 6)
        module = task(kind="residuals")
        given = {"callbacks": list(callbacks), "enable_checkpointing": False}
        ours = strategy(target_modules=["up", "down"])
        trainer(tmp_path, ours, **given).fit(module, loader("residuals"), ckpt_path=checkpoint)
        return module

    with pytest.raises(StorageError, match=r"3\.ckpt' was not written: it would be larger than"):
        fit(Limits(tmp_path / "saved", 3))
    saved = [path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*.ckpt")]
    assert sorted(map(str, saved)) == ["1.ckpt", "2.ckpt"]
    assert not list(tmp_path.rglob(".incomplete-*"))
    resumed = fit(checkpoint=tmp_path / "saved" / "2.ckpt")
    assert not differing(weights(resumed), weights(fit()))


def test_what_keeps_a_file_from_being_written_is_named(tmp_path):
    with pytest.raises(OSError, match="No space left") as full, open("/dev/full", "wb", 0) as file:
        file.write(b"x")
    assert write_problem(tmp_path, full.value).startswith("the disk is full (")
    gone = tmp_path / "gone" / "last.ckpt"
    with pytest.raises(OSError, match="No such file") as absent:
        gone.open("wb")
    assert f"its folder is gone; {str(tmp_path)!r} is what is left" in write_problem(
        gone, absent.value
    )
    assert "read-only" in write_problem(gone, OSError(errno.EROFS, "Read-only file system"))
    assert write_problem(tmp_path, ValueError("x")) is None


def test_a_run_whose_folder_is_taken_away_says_so(tmp_path):
    folder = RunFolder.at(tmp_path / "mine")
    shutil.rmtree(folder.path)
    with pytest.raises(StorageError, match=r"mine' ended: its folder is gone; .* --resume"):
        log_in(folder)


def log_in(folder):
    """Logs a step, as a run does."""
    with RunSession("fit", "mine") as session:
        session.folder = folder
        folder.append(folder.metrics, {"step": 1})


class Ragged(Dataset):
    """Rows of different lengths, which do not make a batch, or that raise an error."""

    def __init__(self, error=None):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.error is not None:
            raise self.error
        return torch.zeros(index + 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "Caught RuntimeError in DataLoader worker"),
        (RuntimeError("cat.png: Connection reset by peer"), "reset by peer"),
    ],
)
def test_what_a_process_that_loads_batches_raises_is_not_its_end(error, words):
    rows = DataLoader(Ragged(error), batch_size=2, num_workers=1)
    with pytest.raises(RuntimeError, match=words), RunSession("fit", "mine"):
        list(rows)


def test_files_that_the_run_reads_are_not_those_that_it_writes(tmp_path):
    folder = RunFolder.at(tmp_path / "mine")

    def run(error):
        with RunSession("fit", "mine") as session:
            session.folder = folder
            raise error

    def raised(kind, error, match):
        with pytest.raises(kind, match=match) as info:
            run(error)
        return info.value

    image = str(tmp_path / "images" / "cat.png")
    absent, locked = (OSError(code, "x", image) for code in (errno.ENOENT, errno.EACCES))
    assert raised(FileNotFoundError, absent, "cat") is absent
    assert raised(PermissionError, locked, "cat") is locked
    raised(OSError, OSError(errno.EIO, "x"), "Errno 5")
    full = raised(StorageError, OSError(errno.ENOSPC, "x", image), r"cat\.png': the disk is full")
    assert full.__cause__.errno == errno.ENOSPC
    raised(StorageError, OSError(errno.ENOSPC, "x"), "ended: the disk is full")
    own = OSError(errno.EACCES, "x", os.path.relpath(folder.metrics))
    raised(StorageError, own, "cannot be written to .* fit --resume .*mine` continues")


def test_last_is_for_the_run_and_a_restart_keeps_what_is_evaluated(tmp_path, monkeypatch):
    """Of the run: a checkpoint that training begins without, and evaluation does not."""
    folder = RunFolder.at(tmp_path / "mine")

    def chosen(kind, **given):
        config = Namespace(**{"run_dir": str(folder.path), "ckpt_path": "last", **given})
        _choose_checkpoint(config, kind, warn=True)
        return config["ckpt_path"]

    assert chosen("fit") is None
    assert chosen("fit", run_dir=None) == "last"
    for kind in ("validate", "test", "predict"):
        with pytest.raises(ConfigError, match=rf"{kind} --ckpt_path last .*mine' has none"):
            chosen(kind)
    with pytest.raises(ConfigError, match="there is no --run_dir"):
        chosen("test", run_dir=None)
    newest = folder.checkpoints / "new.ckpt"
    torch.save({}, newest)
    assert chosen("fit") == chosen("test") == str(newest)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert chosen("fit", ckpt_path="best.ckpt") == str(newest)
    for kind in ("validate", "test", "predict"):
        assert chosen(kind, ckpt_path="best.ckpt") == "best.ckpt"
    folder.write(folder.sweep, {})
    with pytest.raises(ConfigError, match="mine is the folder of a sweep, whose record"):
        chosen("fit", ckpt_path=None)


def test_the_last_checkpoint_is_cut_short(tmp_path, caplog):
    folder = RunFolder.at(tmp_path)
    assert folder.resumable_checkpoint() is None
    for second, name in enumerate(("first", "second", "last")):
        path = folder.checkpoints / f"{name}.ckpt"
        torch.save({"state_dict": {"weight": torch.arange(1000)}}, path)
        os.utime(path, (second, second))
    assert folder.resumable_checkpoint().name == "last.ckpt"
    assert not caplog.messages
    last, second = (folder.checkpoints / f"{name}.ckpt" for name in ("last", "second"))
    for path in (last, second):
        before = path.stat()
        os.truncate(path, before.st_size - 8)
        os.utime(path, (before.st_atime, before.st_mtime))
    with caplog.at_level(logging.WARNING):
        assert folder.resumable_checkpoint().name == "first.ckpt"
    (line,) = caplog.messages
    assert line.startswith(f"last.ckpt, second.ckpt in {folder.checkpoints} cannot be read")
    assert "is taken, first.ckpt," in line
    (folder.checkpoints / "first.ckpt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no whole checkpoint: first\.ckpt, last\.ckpt, second"):
        folder.resumable_checkpoint()


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    folder = RunFolder.at(tmp_path / "run")
    begun, begin = os.pipe()
    ended, end = os.pipe()
    child = os.fork()
    if not child:
        with folder.claimed():
            os.write(begin, b"x")
            os.close(end)
            os.read(ended, 1)
        os._exit(0)
    os.read(begun, 1)
    folder.write(folder.status_file, {"state": "running", "pid": child})
    with (
        pytest.raises(ConfigError, match=rf"Another run \(process {child}\) is at work in .*run'"),
        folder.claimed(),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for pipe in (begun, begin, ended, end):
        os.close(pipe)
    # The system has given the folder back, and what was being saved is of no use.
    left = folder.checkpoints / "adapters" / ".incomplete-1-2"
    left.mkdir(parents=True)
    for path in (left / "adapter_config.json", folder.checkpoints / ".incomplete-1-3"):
        path.write_text("{")
    with pytest.MonkeyPatch.context() as windows:
        windows.setattr("lightning_peft.runs.folder.fcntl", None)
        with folder.claimed():
            assert left.is_dir()
    with folder.claimed():
        assert (folder.path / ".lock").exists()
        assert not list(folder.path.rglob(".incomplete-*"))


def test_adapter_folders_that_were_being_replaced_are_put_back(tmp_path, monkeypatch):
    run, rename = RunFolder.at(tmp_path / "run"), os.replace

    def kill(source, target):
        if not target.name.startswith(".replaced-"):
            raise KeyboardInterrupt
        rename(source, target)

    names = ("one.ckpt", "val/loss=0.5.ckpt", "plain", "removed.ckpt")
    *there, removed = (run.checkpoints / name for name in names)
    for place in (*there, removed):
        write_adapter_folder(place, {"adapter": b"before"})
        monkeypatch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            write_adapter_folder(place, {"adapter": b"after"})
        monkeypatch.setattr(os, "replace", rename)
        assert not adapter_folder(place).exists()
    for place in there:
        place.touch()
    with run.claimed():
        for place in there:
            assert (adapter_folder(place) / "adapter").read_bytes() == b"before"
        assert not adapter_folder(removed).exists()
        assert not [*run.path.rglob(".replaced-*"), *run.path.rglob(".incomplete-*")]


class Spoils(lightning(ROOT).Callback):
    """Makes the loss NaN in one step."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0][:] = float("nan") if batch_idx + 1 == self.at else batch[0]


@pytest.mark.parametrize(("every", "ends"), [(1, 3), (50, 4), (500, 6)])
def test_weights_that_become_nan_are_not_saved(every, ends, tmp_path):
    """The run ends where it would log, at the latest where it would save, or at its end."""
    module = task(kind="residuals")
    points = saver(ROOT, tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    given = {"callbacks": [Spoils(3), *([points] if every < 500 else [])]}
    run = trainer(
        tmp_path,
        strategy(target_modules=["up", "down"]),
        log_every_n_steps=every,
        enable_checkpointing=every < 500,
        **given,
    )
    with pytest.raises(DivergenceError, match=rf"After step {ends}, \d+ of the tensors .* lower"):
        run.fit(module, loader("residuals"))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"] * (every < 500)


class Dies(Dataset):
    """Ends the process that loads its fifth row, as the system does without memory."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return loader("linears").dataset[index]


@pytest.mark.long
def test_a_loader_whose_process_is_ended(tmp_path):
    with (
        pytest.raises(LightningPeftError, match="a process that loads batches was ended from"),
        RunSession("fit", "mine"),
    ):
        trainer(tmp_path).fit(task(), DataLoader(Dies(), batch_size=2, num_workers=1))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting is not allowed here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.long
def test_a_full_disk(small_disk, tmp_path):
    module = task(kind="llama")
    points = saver(ROOT, small_disk, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    class Fills(lightning(ROOT).Callback):
        def on_train_batch_start(self, trainer, *given):
            if trainer.global_step == 3:
                free = shutil.disk_usage(small_disk).free
                (small_disk / "other").write_bytes(bytes(free - 20_000))

    run = trainer(tmp_path, "qlora", callbacks=[points, Fills()])
    with pytest.raises(StorageError, match=r"was not written: the disk is full \(0 MB are free\)"):
        run.fit(module, loader("llama"))
    assert sorted(path.name for path in small_disk.glob("*.ckpt")) == [
        f"step={step}.ckpt" for step in (1, 2, 3)
    ]
    assert not list(small_disk.rglob(".incomplete-*"))
    (small_disk / "other").unlink()
    again = trainer(tmp_path, "qlora")
    again.fit(task(kind="llama"), loader("llama"), ckpt_path=small_disk / "step=3.ckpt")
    assert again.global_step == 6


@pytest.mark.long
def test_a_disk_that_becomes_read_only(small_disk):
    folder = RunFolder.at(small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="cannot be kept in .*Read-only"), folder.claimed():
        pass
    with pytest.raises(StorageError, match="it cannot be written to"):
        log_in(folder)
