"""``lightning-peft fit`` in several processes: started by itself, torchrun, two nodes, SLURM."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser
from trials import QUIET

from lightning_peft.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
SMALL = ["--config=sft-lora", "--config=small/sft", "--config=saving.yaml", *QUIET]
SAVING = """
data:
  init_args: {batch_size: 4}
trainer:
  accelerator: cpu
  limit_train_batches: 12
  limit_val_batches: 1
  callbacks:
    - class_path: lightning_peft.tasks.BestCheckpoint
      init_args: {save_every: 2}
    - class_path: gate.Gate
"""
# Where GATE is set, holds a run before its seventh step until there is a file `open`.
GATE = """
import os, time
from importlib import import_module
from pathlib import Path

from lightning_peft.plugin.namespace import namespace_in_use


class Gate(import_module(namespace_in_use()).Callback):
    def on_train_batch_start(self, trainer, *given):
        if trainer.global_step == 6 and "GATE" in os.environ and not Path("open").exists():
            Path(f"held{trainer.global_rank}").touch()
            until = time.monotonic() + 200
            while not Path("open").exists() and time.monotonic() < until:
                time.sleep(0.05)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_short_options_win_over_recipes(in_process):
    short = ["--devices=2", "--num_nodes", "3", "--sharding=fsdp2"]
    done = in_process("fit", *short, "--config=sft-lora", "--print_config")
    assert done.returncode == 0, done.stderr
    assert "\n  devices: 2\n" in done.stdout.replace("'", "")
    assert "\n  num_nodes: 3\n" in done.stdout
    assert "\n      sharding: fsdp2\n" in done.stdout


def test_the_files_of_the_docs_can_be_read():
    """By bash, YAML and torchrun; numbers of processes in one file are the same."""
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    scripts = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (agent,) = [one for one in scripts if "--nnodes" in one]
    (batch,) = [one for one in scripts if "#SBATCH" in one]
    service, job = yaml.safe_load_all(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    words = shlex.split(agent.partition("torchrun")[2].replace("\\\n", " "))
    for command in (words, container["command"][1:]):
        given = get_args_parser().parse_args(command)
        assert given.training_script == "lightning_peft.cli"
        assert given.training_script_args[0] == "fit"
        assert (given.nnodes, given.nproc_per_node, given.max_restarts) == ("2", "8", 3)
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert given.rdzv_endpoint == f"mine-0.mine:{service['spec']['ports'][0]['port']}"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", batch))
    assert f"--devices {options['ntasks-per-node']} --num_nodes {options['nodes']} " in batch
    assert options["gres"] == "gpu:8"


@pytest.fixture
def launched(tmp_path):
    """Starts commands in a folder, each in a session of its own; all of them end with the test."""
    (tmp_path / "saving.yaml").write_text(SAVING)
    (tmp_path / "gate.py").write_text(GATE)
    started = []

    def start(module, *words, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, words)],
            cwd=tmp_path,
            env=ENVIRONMENT | environment,
            stdout=(tmp_path / f"{len(started)}.out").open("wb"),
            stderr=(tmp_path / f"{len(started)}.err").open("wb"),
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for one in family(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(timeout=60)
    # For a test that hangs, and is ended by pytest.
    print(errors(tmp_path))


def errors(folder):
    """Returns the end of what each command wrote to its error output."""
    files = sorted(folder.glob("*.err"))
    return "\n".join(f"{path.name}: {path.read_text()[-4000:]}" for path in files)


def family(process):
    """Returns a process and all below it, the last ones first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [*reversed(parent.children(recursive=True)), parent]
    return []


def ends(process, folder, code=0):
    process.wait()
    assert process.returncode == code, errors(folder)


def torchrun(*options):
    return ["torch.distributed.run", *options, "-m", "lightning_peft.cli", "fit", *SMALL]


def wait(there, process):
    while not there():
        assert process.poll() is None, process.returncode
        time.sleep(0.05)


def held(folder, rank):
    return (folder / f"held{rank}").exists


def rank_of(process, rank):
    """Returns the process below a launcher that has this rank."""
    for one in family(process):
        with contextlib.suppress(psutil.Error):
            if one.environ().get("RANK") == str(rank):
                return one
    raise AssertionError(f"there is no rank {rank}")


def trained(folder):
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 12
    return content["state_dict"]


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_open(port):
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
def test_a_killed_rank_is_started_again_by_torchrun(launched, tmp_path):
    """Lightning's own launcher trains the same, in one folder; each step is in the record once."""
    ends(launched("lightning_peft.cli", "fit", *SMALL, "--devices=2", "--run_dir=own"), tmp_path)
    words = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    process = launched(*words, "--run_dir=killed", GATE="1")
    killed = RunFolder(tmp_path / "killed")
    wait(held(tmp_path, 1), process)
    rank_of(process, 1).kill()
    (tmp_path / "open").touch()
    ends(process, tmp_path)
    assert same(trained(tmp_path / "killed"), trained(tmp_path / "own"))
    steps = [
        {row["step"] for row in RunFolder(tmp_path / name).rows(RunFolder(tmp_path / name).metrics)}
        for name in ("killed", "own")
    ]
    assert steps[0] == steps[1]
    assert killed.status.state == "finished"
    assert not (tmp_path / "runs").exists()
    started = [row["text"] for row in killed.rows(killed.events) if row["kind"] == "started"]
    assert len(started) == 2
    assert started[1].startswith("Training starts at step ")


@pytest.mark.long
def test_restarts_that_could_not_continue_are_refused(launched, tmp_path):
    words = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1")
    ends(launched(*words, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0"), tmp_path, code=1)
    said = (tmp_path / "0.err").read_text()
    assert "--max-restarts could not continue the run:\n  - there is no --run_dir" in said
    assert "\n  - torchrun keeps the addresses of processes that are gone" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_two_launchers_are_two_nodes(launched, tmp_path):
    port = free_port()
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two"]
    words = torchrun("--nnodes=2", "--nproc-per-node=1", *rendezvous)
    nodes = [launched(*words, "--run_dir=nodes") for _ in range(2)]
    for node in nodes:
        ends(node, tmp_path)
    ends(launched(*torchrun("--standalone", "--nproc-per-node=2"), "--run_dir=one"), tmp_path)
    assert same(trained(tmp_path / "nodes"), trained(tmp_path / "one"))


@pytest.mark.long
def test_a_run_continues_with_the_nodes_that_are_left(launched, tmp_path):
    port = free_port()
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=left"]
    rendezvous += ["--rdzv-conf=last_call_timeout=5,keep_alive_interval=1"]
    words = torchrun("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2", *rendezvous)
    first = launched(*words, "--run_dir=left", GATE="1")
    # The one that keeps the rendezvous has to stay.
    wait(lambda: is_open(port), first)
    second = launched(*words, "--run_dir=left", GATE="1")
    folder = RunFolder(tmp_path / "left")
    wait(held(tmp_path, 1), first)
    for one in family(second):
        one.kill()
    (tmp_path / "open").touch()
    ends(first, tmp_path)
    content = torch.load(folder.checkpoints / "last.ckpt", weights_only=True)
    assert folder.status.state == "finished"
    assert content["global_step"] >= 12
    assert "continues with other random numbers" in (tmp_path / "0.err").read_text()


@pytest.mark.long
def test_a_notice_before_preemption_saves_and_the_job_continues(launched, tmp_path):
    """SIGTERM to the agent of torchrun, as SLURM and Kubernetes send it; loaders have processes."""
    words = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=3")
    words += ["--data.init_args.num_workers=1", "--run_dir=run", "--ckpt_path=last"]
    folder = RunFolder(tmp_path / "run")
    process = launched(*words, GATE="1")
    wait(held(tmp_path, 1), process)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "open").touch()
    process.wait()
    assert folder.status.state == "stopped", (tmp_path / "0.err").read_text()[-4000:]
    assert folder.newest_checkpoint().name == "interrupted.ckpt"
    ends(launched(*words), tmp_path)
    ends(launched(*torchrun("--standalone", "--nproc-per-node=2"), "--run_dir=whole"), tmp_path)
    assert same(trained(tmp_path / "run"), trained(tmp_path / "whole"))


@pytest.mark.long
def test_tasks_of_slurm_keep_one_record(launched, tmp_path):
    """Two nodes of one task, with the variables of srun."""
    job = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_JOB_NAME": "train"}
    words = ["fit", *SMALL, "--devices=1", "--num_nodes=2"]
    tasks = [
        launched("lightning_peft.cli", *words, **job, SLURM_PROCID=n, SLURM_NODEID=n) for n in "01"
    ]
    for one in tasks:
        ends(one, tmp_path)
    (path,) = (tmp_path / "runs").iterdir()
    assert trained(path)
    assert RunFolder(path).status.state == "finished"


@pytest.mark.long
def test_a_run_ends_when_one_of_its_processes_does(launched, tmp_path):
    """Without torchrun nothing starts it again; `--resume` continues to the same end."""
    ends(launched("lightning_peft.cli", "fit", *SMALL, "--devices=2", "--run_dir=whole"), tmp_path)
    words = ["lightning_peft.cli", "fit", *SMALL, "--devices=2", "--run_dir=run"]
    process = launched(*words, GATE="1")
    folder = RunFolder(tmp_path / "run")
    wait(held(tmp_path, 1), process)
    (child,) = (one for one in family(process)[:-1] if one.environ().get("LOCAL_RANK") == "1")
    child.kill()
    (tmp_path / "open").touch()
    process.wait()
    assert process.returncode != 0
    assert folder.status.state in ("failed", "crashed")
    ends(launched("lightning_peft.cli", "fit", "--resume=run", *QUIET), tmp_path)
    assert same(trained(tmp_path / "run"), trained(tmp_path / "whole"))
