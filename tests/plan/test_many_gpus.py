"""Plans of several processes: against counted bytes, and against arithmetic by hand."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import engine
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plan.cluster import Cluster, cluster_of, step_bounds
from lightning_peft.plan.prediction import plan_memory
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.work import Work

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("many_gpus")


SOME = [("qlora", 4)]
ALL = [(method, count) for method in ("qlora", "lora") for count in (1, 2, 4)]


@pytest.mark.parametrize(
    ("method", "count"),
    [*SOME, *(pytest.param(*one, marks=pytest.mark.long) for one in ALL if one not in SOME)],
)
def test_a_plan_is_near_what_processes_hold(script, method, count):
    record = json.loads((ROOT / "benchmarks" / "records" / "sharding.json").read_text())
    plan = script.counted_plan(method, count)
    for held in record["held"][f"{method} {count}"]:
        assert script.base_bytes(plan) == pytest.approx(held["frozen"] + held["tables"], rel=0.05)
        assert plan.breakdown["adapters"] == held["adapters"]
        # torch's optimizers count steps in a number for each tensor.
        assert plan.trace.optimizer == pytest.approx(held["optimizer"], rel=1e-3)


def test_tables_of_the_page_are_those_of_the_script(script):
    page = (ROOT / "docs" / "planner.md").read_text(encoding="utf-8")
    for name, rows in (("counted", 18), ("published of several", 10), ("many gpus", 18)):
        table = page.partition(f"<!-- {name} begins -->")[2].partition(f"<!-- {name} ends -->")[0]
        lines = [line for line in table.splitlines() if line.startswith("| ")][2:]
        assert len(lines) == rows
        assert name != "published of several" or all(
            anchor.what in line for anchor, line in zip(script.anchors(), lines, strict=True)
        )


class Blocks(nn.Module):
    """An embedding, two blocks and a head: what is outside of blocks, and inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, tokens):
        rows = self.embed(tokens)
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows)


def shared_plan(processes, **given):
    return plan_memory(
        Blocks(), torch.zeros(4, 8, dtype=torch.long), method="lora", processes=processes,
        sharding="fsdp2", device="cpu", gradient_checkpointing=False, **given,
    )  # fmt: skip


BLOCK = 4 * (64 * 128 + 128 + 128 * 64 + 64)


def test_the_base_is_shared_and_the_rest_is_not():
    one, three = shared_plan(1), shared_plan(3)
    dense = one.breakdown["weights_dense"]
    assert one.breakdown["gathered"] == one.breakdown["gradient_buckets"] == 0
    # 100 rows of an embedding are 34, 33 and 33, and all parts are padded to the largest.
    shares = 4 * (34 * 64) + 2 * 4 * (43 * 64 + 43 + 22 * 128 + 22)
    head = dense - 4 * 100 * 64 - 2 * BLOCK
    assert three.breakdown["weights_dense"] == shares + head
    assert three.breakdown["adapters"] == one.breakdown["adapters"]
    assert three.trace.gradients == three.breakdown["gradient_buckets"]
    padded = 3 * 4 * (43 * 64 + 43 + 22 * 128 + 22)
    outside = 3 * 4 * 34 * 64
    assert three.breakdown["gathered"] == outside + 2 * padded
    assert three.trace.work.gathered == outside + 2 * 2 * padded
    assert three.trace.work.averaged == three.trace.gradients


def test_what_a_run_cannot_share_is_not_planned():
    module = Blocks()
    module.attention = nn.MultiheadAttention(64, 2)
    batch = torch.zeros(4, 8, dtype=torch.long)
    lora = {"target_modules": ["attention"]}
    with pytest.raises(UnsupportedError, match="adapters on 'attention'"):
        plan_memory(
            module, batch, method="lora", lora=lora, processes=2, sharding="fsdp2", device="cpu",
            gradient_checkpointing=False,
        )  # fmt: skip


def test_work_grows_with_batches_and_sends_what_rings_send():
    one, two = shared_plan(4), shared_plan(4, accumulate=2)
    work, twice = one.trace.work, two.trace.work
    assert twice.gathered == 2 * work.gathered
    assert twice.flops == pytest.approx(2 * work.flops, rel=0.01)
    assert twice.averaged == work.averaged
    assert work.sent(4) == (work.gathered + 2 * work.averaged) * 3 // 4
    assert work.sent(1) == 0


def test_products_are_counted_as_by_hand():
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    plan = plan_memory(layers, torch.zeros(16, 64), method="full", processes=2, device="cpu")
    # Three forward, three for the weights, and two for inputs: those of the first need none.
    assert plan.trace.work.flops == 8 * 2 * 16 * 64 * 64
    # Each reads two matrices and writes one; the optimizer moves seven numbers for each weight.
    assert plan.trace.work.moved >= 4 * 8 * (64 * 64 + 2 * 16 * 64) + 28 * 3 * 64 * 64
    assert plan.breakdown["gradient_buckets"] == 4 * 3 * 64 * 64


@pytest.mark.parametrize("method", ["full", "lora"])
def test_without_sharding_each_process_has_all_of_it(method):
    batch = torch.zeros(4, 8, dtype=torch.long)
    one, eight = (
        plan_memory(
            Blocks(), batch, method=method, processes=n, device="cpu",
            sharding="fsdp2" if method == "full" else None,
        )
        for n in (1, 8)
    )  # fmt: skip
    assert eight.breakdown["weights_dense"] == one.breakdown["weights_dense"]
    assert eight.breakdown["gathered"] == eight.trace.work.gathered == 0
    assert eight.breakdown["gradient_buckets"] == one.trace.gradients


def test_what_is_shared_of_4_bit_layers_is_their_bytes():
    module = Blocks()
    engine.inject(module, r=4, quantization_config=engine.quantization_config())
    found = engine.shared_weights(module)
    quantized = [one for one in found if one.is_quantized]
    assert len(quantized) == 4
    # Codes, a byte for each block of 64 and a constant for those, each filled up to 16.
    assert {one.bytes for one in quantized} == {64 * 128 // 2 + 128 + 16}
    assert {one.block for one in quantized} == {"blocks.0", "blocks.1"}
    assert [one.share(5) for one in quantized[:1]] == [-(-(64 * 128 // 2 + 144) // 5)]


def test_what_bounds_a_step():
    work = Work(flops=10**15, moved=10**12, gathered=8 * 10**10, averaged=0)
    fast = Cluster(8, 1, 1000, 2000, 100, 10)
    bounds = step_bounds(work, fast)
    assert (bounds.compute, bounds.memory, bounds.interconnect) == (1.0, 0.5, 0.7)
    assert (bounds.bound, bounds.seconds) == ("compute", 1.0)
    # Between nodes the same bytes pass through what is slower.
    far = step_bounds(work, Cluster(4, 2, 1000, 2000, 100, 10))
    assert (far.bound, far.seconds) == ("interconnect", 7.0)
    assert step_bounds(work, Cluster(1, 8, 1000, 2000, 1, 100)).interconnect == 0.7
    assert step_bounds(work, Cluster(8, 1, 1000, None, 100, 10)) is None
    # What is not used need not be known.
    assert step_bounds(work, Cluster(8, 1, 1000, 2000, 100)) == bounds
    assert step_bounds(work, Cluster(1, 8, 1000, 2000, None, 100)).interconnect == 0.7
    assert Cluster(8, 2, 1000, 2000, 100).missing == ["network_bandwidth"]


def test_figures_of_makers_can_be_replaced():
    assert cluster_of("h100-80", 8, 2, {"tflops": 400.0}) == Cluster(8, 2, 400.0, 3350, 450, 400)
    assert cluster_of("24GB", 8, 1, {"tflops": 400.0}) == Cluster(8, 1, 400.0)
    with pytest.raises(ConfigError, match=r"(?s)gpus=0: a number above 0.*tflops=-1: a number"):
        cluster_of("h100", 0, 1, {"tflops": -1})
    with pytest.raises(ConfigError, match=r"(?s)processes=0: a positive.*'zero3': 'fsdp2', or"):
        PlanSettings(processes=0, sharding="zero3")


@pytest.mark.long
def test_all_layers_lie_on_the_line_through_some(script):
    settings = PlanSettings("qlora", processes=8, sharding="fsdp2")
    found = script.plan("Llama-3.1-8B", settings)
    dimensions = {**script.MODELS["Llama-3.1-8B"], "max_position_embeddings": 131072}
    whole = script.plan_of(dimensions, settings, script.chunked_loss)
    assert found.breakdown == whole.breakdown
    assert found.trace.work == whole.trace.work
