"""What the benchmarks write, from records; nothing is measured here."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


@pytest.fixture
def load(monkeypatch):
    """Imports a script by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def between(name):
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- {name} begins -->\n\n")
    text, found, _ = rest.partition(f"\n\n<!-- {name} ends -->")
    assert found
    return text


def test_the_page_says_what_the_records_say(load):
    assert between("summary") == "\n".join(load("targets").summary())
    assert between("other records") == "\n".join(load("all").others())


def test_every_target_has_its_row_and_every_ratio_is_measured_somewhere(load):
    targets, steps = load("targets"), load("training_step")
    assert [line.split("|")[1].strip() for line in targets.summary()[2:]] == [
        str(number) for number in range(1, len(targets.TARGETS) + 1)
    ]
    made = {f"{case}: {one} / {other}, {what}" for case, one, other, what in steps.RATIOS}
    bounds = [*targets.CHECKS, *(bound for target in targets.TARGETS for bound in target.bounds)]
    named = {bound.ratio for bound in bounds if bound.record == "training_step"}
    assert named <= made


def test_a_median_above_its_bound_is_named(load, monkeypatch, capsys):
    targets, record = load("targets"), load("record")
    first, *others = targets.CHECKS
    found = {bound.record: {"ratios": {}} for bound in targets.CHECKS}
    for bound in targets.CHECKS:
        value = bound.most * (1.5 if bound is first else 0.5)
        found[bound.record]["ratios"][bound.ratio] = record.spread([value, value, 9.0])
    monkeypatch.setattr(targets, "read", lambda name: found[name.removesuffix(".check")])
    assert targets.broken() == [first.label]
    monkeypatch.setattr(targets, "read", lambda name: None)
    assert targets.broken() == [first.label, *(bound.label for bound in others)]
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "other", [{"cpu": "6502"}, {"cores": 1982}, {"versions": {"torch": "0.1"}}]
)
def test_nothing_is_added_to_the_record_of_another_machine(load, monkeypatch, tmp_path, other):
    record, script = load("record"), load("real_step")
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    content = {"conditions": record.conditions()}
    (tmp_path / "real_step.json").write_text(json.dumps(content), encoding="utf-8")
    assert record.read_to_add("real_step") == content
    content["conditions"] |= other
    (tmp_path / "real_step.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit, match="The record is of .*(6502|1982|0.1).*, and this is"):
        script.profile()


def test_the_time_of_a_profile_is_shared_out(load):
    profiles = load("profiles")
    weight = torch.nn.Parameter(torch.randn(256, 256))
    optimizer = torch.optim.AdamW([weight])
    with profiles.torch_profiler() as profile:
        (torch.randn(64, 256) @ weight).log_softmax(-1).sum().backward()
        optimizer.step()
    groups = profiles.shares(profile.events())["groups"]
    assert sum(groups.values()) == pytest.approx(1)
    assert all(groups[name] > 0 for name in ("matmul", "cross-entropy", "optimizer", "rest"))
    assert groups["dequantize"] == groups["attention"] == 0

    def closure():
        optimizer.zero_grad()
        loss = (torch.randn(64, 256) @ weight).cos().sum()
        loss.backward()
        return loss

    with profiles.torch_profiler() as profile:
        optimizer.step(closure)
    events = list(profile.events())
    ends = profiles._ends_of_closures(events)
    cosine = next(event for event in events if event.name == "aten::cos")
    assert profiles.group_of(cosine, ends) == "rest"
    assert profiles.group_of(cosine, {}) == "optimizer"
    last = max(events, key=lambda event: (event.cpu_parent is not None, event.time_range.start))
    assert profiles.group_of(last, ends) == "optimizer"


def test_methods_of_a_case_differ_where_their_losses_do(load):
    tables = load("training_tables")
    near = [6.0, 5.9, 5.8, 5.71, 5.69, 5.72]
    rows = tables._losses({"case": {
        "by hand": {"losses": near},
        "same": {"losses": [loss + 0.001 for loss in near]},
        "other": {"losses": [loss + 1 for loss in near]},
        "floor": {"losses": []},
    }})  # fmt: skip
    verdicts = [row.split("|")[6].strip() for row in rows if row.startswith("| case |")][1:]
    assert verdicts == ["yes", "yes", "no"]


def test_packs_hold_every_example_once(load):
    cases, methods = load("training_case"), load("training_methods")
    case = cases.Case("", "tiny", True, rows=2, length=128, data="instructions")
    packs = methods.packs(case)
    flat = sorted(str(row["input_ids"]) for pack in packs for row in pack)
    assert flat == sorted(str(row["input_ids"]) for row in cases.examples(case, 128))
    assert max(map(methods.tokens_of, packs)) <= 128


# --- the kit for a GPU ---------------------------------------------------------------------------


@pytest.fixture
def kit(load, monkeypatch):
    """The script of the kit, as a module."""
    before = list(sys.path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    yield load("run")
    sys.path[:] = before


def test_the_kit_takes_up_what_is_missing(kit, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--record", str(path), "--only", "ceilings"]
    first = kit.main([*words, "--seconds", "0"])
    assert "s left, about 2 s needed" in first.record["parts"]["ceilings"]["copy"]["skipped"]
    second = kit.main(words).record
    assert second["parts"]["ceilings"]["product"]["flops"] > 0
    third = kit.main([*words, "--seconds", "0"])
    assert third.record["parts"] == second["parts"] == json.loads(path.read_text())["parts"]

    def breaks():
        raise RuntimeError("no kernel\nat all")

    assert third.row("own", "row", -60, breaks) == {"failed": "RuntimeError: no kernel"}
    assert third.row("own", "row", -60, lambda: {"value": 1})["value"] == 1


def test_the_tables_of_the_kit_say_what_is_missing(kit, load):
    tables, record = load("tables"), load("record")
    assert between("gpu") == "\n".join(tables.lines(record.read("gpu") or {}))
    name, step = "1B QLoRA, 512 tokens", {"seconds": {"median": 0.02}, "tokens": 512}
    parts = {
        "predictions": {name: {"allocated": 1.1e9}},
        "steps": {
            f"{name}: ours": {**step, "allocated": 1e9, "reserved": 2e9, "card": 3e9},
            f"{name}: PEFT + bitsandbytes": {**step, "seconds": {"median": 0.04}, "allocated": 4e9},
        },
        "waits": {"one step": {"calls": {"cudaLaunchKernel": 9, "cudaStreamSynchronize": 2}}},
        "paging": {"states beyond the card": {"skipped": "3 s left"}},
    }
    found = tables.lines({"device": "cuda", "parts": parts, "conditions": {"capability": "9.0"}})
    assert f"| {name} | 20.0 | 40.0 | 0.50 | 25,600 | 1.00 | 4.00 |" in found
    assert f"| {name} | 1.17 | 1.00 | +16.7% | 2.00 | 3.00 |" in found
    assert "A step of 1B QLoRA launches 9 kernels and waits 2 times." in found
    assert found[-1] == "- paging, states beyond the card: 3 s left"
    assert len(tables.lines({"device": "cpu", "parts": parts})) == 1


@pytest.mark.long
def test_the_kit_runs_to_its_end_on_a_cpu(tmp_path):
    path = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--seconds", "900", "--record", str(path)]
    script = str(ROOT / "benchmarks" / "gpu" / "run.py")
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, timeout=1000, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(path.read_text())["parts"]
    assert {*parts} == {
        "predictions", "ceilings", "agreement", "steps", "optimizers", "waits", "tests", "peers",
        "loading", "paging",
    }  # fmt: skip
    problems = {
        f"{part}, {name}": row
        for part, rows in parts.items()
        for name, row in rows.items()
        if {"failed", "skipped"} & row.keys()
    }
    assert problems == {}
    # What rounding to bfloat16 leaves of the sums of 64 products.
    assert all(0 < row["worst"] < 2e-2 for row in parts["agreement"].values())
    assert parts["paging"]["states beyond the card"]["same"] is True
    ours, theirs = (parts["steps"][f"tiny QLoRA, 16 tokens: {way}"]["losses"]
                    for way in ("ours", "PEFT + bitsandbytes"))  # fmt: skip
    # The same base, and adapters that start from nothing.
    assert ours[0] == pytest.approx(theirs[0], rel=2e-3)
