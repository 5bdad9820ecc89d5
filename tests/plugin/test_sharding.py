"""Processes that share a frozen base by FSDP2 train what processes with a whole base train."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from modules import build, differing, loader, strategy, task, trainer
from process_faults import check_answers
from two_sharded_processes import FAULTS, ROOT, SETTINGS, local_bytes, trained

import lightning_peft
from lightning_peft.compat.torch_distributed import leave_out_of_ddp
from lightning_peft.engine.backends.packed import PackedWeight, Share
from lightning_peft.engine.sharding import spread_parameters, warn_of_few_blocks
from lightning_peft.errors import ConfigError, LifecycleError, UnsupportedError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

# What the encoder returns goes into each block of the decoder, and FSDP puts a node of autograd in
# front of each block: gradients are added up in another order.
ROUNDED = ("t5", "whisper")


def check_same(found, expected, rounded):
    """All tensors are the same bits, or but for rounding."""
    assert found.keys() == expected.keys()
    if not rounded:
        assert not differing(found, expected)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


def check_case(ranks, case, folder):
    """A shared base changes no bit of what is trained or written, and no process has all of it."""
    kind, method = case.split(":")
    rounded = kind in ROUNDED
    for rank in ranks:
        seen = rank[case]
        assert len(seen["sharded"]["losses"]) >= 3
        losses = seen["sharded"]["losses"], seen["whole"]["losses"]
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=0, atol=1e-6 * rounded)
        assert seen["sharded"]["weights"]
        check_same(seen["sharded"]["weights"], seen["whole"]["weights"], rounded)
        share = seen["bytes"] * len(ranks) / seen["whole bytes"]
        # Of these small tensors, the padding is a part.
        assert 0.99 < share < 1.2, share
        assert {*seen["refusals"]} >= {"merge", "report", "weight", "values"}
        shape, dtype = seen["read"]
        assert (shape[-1], dtype) == (32, torch.float32) or kind != "llama"
    first, second = ranks[0][case], ranks[1][case]
    assert first["sharded"]["losses"] != second["sharded"]["losses"]
    assert not differing(first["sharded"]["weights"], second["sharded"]["weights"])
    files = {}
    for name in ("whole", "sharded"):
        path = folder / f"{kind} {method}" / f"{name}.ckpt"
        files[name] = torch.load(path, weights_only=True)
        adapters = path.parent / "adapters" / name
        files[f"{name} adapter"] = (adapters / "adapter_model.safetensors").read_bytes()
        files[f"{name} config"] = (adapters / "adapter_config.json").read_bytes()
    whole, sharded = files["whole"], files["sharded"]
    assert list(whole["state_dict"]) == list(sharded["state_dict"])
    check_same(sharded["state_dict"], whole["state_dict"], rounded)
    assert rounded or repr(whole["optimizer_states"]) == repr(sharded["optimizer_states"])
    assert repr(whole[CHECKPOINT_KEY]) == repr(sharded[CHECKPOINT_KEY])
    assert rounded or files["whole adapter"] == files["sharded adapter"]
    assert files["whole config"] == files["sharded config"]


def check_loading(ranks):
    """However a base is loaded, each process keeps its part of a weight once it is quantized."""
    for rank in ranks:
        seen = rank["loading"]
        pairs = {"full disk": "whole", "file": "whole", "cache": "whole, cache"}
        for name, whole in {**pairs, "cast": "whole, cast"}.items():
            assert seen[name]["losses"] == seen[whole]["losses"]
            assert not differing(seen[name]["weights"], seen[whole]["weights"])
            assert seen[name]["mine"] * len(ranks) == seen[name]["whole"] > 0
            assert seen[whole]["whole"] == 0
            assert seen[name]["report"] == seen[whole]["report"]
        # Those of a file are dense until they are adapted, and go into the cache then.
        assert {name: way["on load"] for name, way in seen.items()} == {
            "whole": 0, "full disk": 0, "file": 0,
            "cache": 14, "whole, cache": 14, "whole, cast": 14, "cast": 14,
        }  # fmt: skip
        assert not differing(seen["whole"]["weights"], seen["whole, cache"]["weights"])
        assert "keeps 1/2 of it in this process" in seen["cast"]["read"]


def in_one_process(folder, kind, ckpt_path=None, **given):
    """Trains with the same rows in each step, in this process."""
    torch.manual_seed(7)
    module = task(ROOT, kind=kind)
    ours = strategy("qlora", ROOT, sharding="fsdp2")
    run = trainer(folder / "one", ours, ROOT, **{**SETTINGS[kind], **given})
    torch.manual_seed(8)
    run.fit(module, loader(kind), loader(kind), ckpt_path=ckpt_path)
    return module


def test_two_processes_share_a_base(run_processes, tmp_path):
    cases = ("llama:qlora", "llama_tied:lora")
    build("llama").save_pretrained(tmp_path / "base")
    ranks = run_processes(tmp_path, 2, *cases)
    check_loading(ranks)
    for rank in ranks:
        whole, sharded = rank["tokens"]["None"], rank["tokens"]["fsdp2"]
        assert len(sharded["losses"]) == 4
        assert sharded["losses"] == whole["losses"]
        assert not differing(sharded["weights"], whole["weights"])
        assert sharded["chunked"]
        assert sharded["padding free"]
    for case in cases:
        check_case(ranks, case, tmp_path)

    check_answers(ranks, FAULTS)
    for rank in ranks:
        assert "Ranks [1] have another base model than rank 0" in rank["other base"]
        assert "model.model.layers.1.mlp.up_proj.weight" in rank["other base"]
        assert "process 0: 'model.0', 'model.2'\n" in rank["other blocks"]
        assert "process 1: 'model.1', 'model.2'\n" in rank["other blocks"]
        # Each from the checkpoint of the other.
        assert len(rank["resumed sharded"]["losses"]) == 6
        assert rank["resumed sharded"]["losses"] == rank["resumed whole"]["losses"]
        assert not differing(rank["resumed sharded"]["weights"], rank["resumed whole"]["weights"])
        again = rank["llama_tied:lora"]["again"]
        assert again == rank["llama_tied:lora"]["whole again"]
        assert again[0] != again[1]
        stages = rank["llama:qlora"]["stages"]
        assert "(num_training_batches)" in stages["unequal training"]
        assert "process 0: 2\n" in stages["unequal training"]
        assert stages["after fit"] == stages["fresh"]
        assert torch.isfinite(stages["predicted"]).all()
        assert "different numbers of batches (num_predict_batches)" in stages["unequal"]
        assert "process 0: [2]\n" in stages["unequal"]
        assert "process 1: [1]" in stages["unequal"]
        assert "as training_step returned None in process 1: " in rank["llama:qlora"]["verified"]
        refused = rank["llama:qlora"]["refusals"]
        assert refused["merge"].startswith("Merging needs the whole frozen base")
        assert "left 1/2 of it in this process" in refused["report"]
        assert "each process would stop at another token" in refused["generate"]
        assert "sharding='fsdp2' keeps 1/2 of it" in refused["weight"]

    # One process has nothing to share, trains the same and takes the checkpoint of two.
    module = in_one_process(tmp_path, "llama")
    both = torch.tensor([rank["llama:qlora"]["sharded"]["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(both, torch.tensor(module.losses), rtol=0, atol=1e-5)
    assert local_bytes(module) == ranks[0]["llama:qlora"]["whole bytes"]
    path = tmp_path / "llama qlora" / "sharded.ckpt"
    loaded = lightning_peft.load_from_checkpoint(type(module), path)
    expected = ranks[0]["llama:qlora"]["sharded"]["weights"]
    found = {n: p for n, p in loaded.named_parameters() if n in expected}
    assert not differing(found, expected)
    for name, value in trained(module)["weights"].items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3)
    resumed = in_one_process(tmp_path, "llama", ckpt_path=path, max_epochs=2)
    assert len(resumed.losses) == 6


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_models_share_a_base(count, run_processes, tmp_path):
    kinds = ("llama", "llama_tied", "gpt2", "residuals", "t5", "vit", "whisper")
    cases = [f"{kind}:{method}" for kind in kinds for method in ("qlora", "lora")]
    cases += ["llama:fp4", "llama:saved", "llama_tied:saved", "llama:dora"]
    cases += ["llama:tokens", "llama_tied:tokens", "llama:embeddings"]
    ranks = run_processes(tmp_path, count, *cases)
    for case in cases:
        check_case(ranks, case, tmp_path)


@pytest.mark.long
def test_two_of_four_processes_share_a_base(run_processes, tmp_path):
    """The others have copies of it: the same bits as with a whole base, and with all four."""
    build("llama").save_pretrained(tmp_path / "base")
    ranks = run_processes(tmp_path, 4, script="hybrid_processes.py")
    for rank in ranks:
        for method in ("qlora", "lora"):
            whole, four, two, offloaded = (
                rank[f"{method} {name}"] for name in ("whole", "four", "two", "two, offload")
            )
            for found in (four, two, offloaded):
                assert found["losses"] == whole["losses"]
                assert not differing(found["weights"], whole["weights"])
            # Of these small tensors, the padding is a part.
            assert 0.99 < 2 * two["bytes"] / whole["bytes"] < 1.1
            assert two["bytes"] == offloaded["bytes"]
            assert 0.99 < 4 * four["bytes"] / whole["bytes"] < 1.2
            assert "dp_shard_size=3 with 4 processes" in rank[f"{method} three"]
        resumed = rank["resumed whole"], rank["resumed two"]
        assert resumed[0]["losses"] == resumed[1]["losses"]
        assert not differing(resumed[0]["weights"], resumed[1]["weights"])
        whole, two = (rank["cached"][name] for name in ("whole", "two"))
        assert (two["on load"], whole["on load"]) == (0, 14)
        assert not differing(two["weights"], whole["weights"])
    assert ranks[0]["qlora two"]["losses"] != ranks[2]["qlora two"]["losses"]
    module = in_one_process(tmp_path, "llama")
    mean = torch.tensor([rank["qlora two"]["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean, torch.tensor(module.losses), rtol=0, atol=1e-5)


def test_parts_in_the_memory_of_the_cpu_do_not_move():
    module = task(ROOT, kind="llama_tied")
    lightning_peft.engine.inject(module, r=4)
    share = Share(0, 2, on_cpu=True)
    lightning_peft.engine.keep_own_part(module, share, torch.device("meta"))
    before = {n: p.clone() for n, p in spread_parameters(module).items()}
    with lightning_peft.engine.parts_left_in_place(module, share):
        module.to("meta")
    after = spread_parameters(module)
    assert before
    assert not differing(after, before)
    assert all(p.is_meta for p in module.parameters() if p.requires_grad)
    assert module.model.lm_head.weight is module.model.model.embed_tokens.weight


@pytest.mark.long
def test_experts_share_a_base(run_processes, tmp_path):
    cases = ("mixtral:qlora", "gpt-oss:lora", "llama4:qlora")
    ranks = run_processes(tmp_path, 2, *cases)
    for case in cases:
        check_case(ranks, case, tmp_path)
    for rank in ranks:
        for kind in ("mixtral", "llama4"):
            trained_names = rank[f"{kind}:qlora"]["sharded"]["weights"]
            assert any("experts.gate_up_proj" in name for name in trained_names)
        assert rank["resumed sharded"]["losses"] == rank["resumed whole"]["losses"]


@pytest.mark.long
def test_resuming_in_another_number_of_processes(run_processes, tmp_path):
    """Two, four and one process go on from a checkpoint to the same adapters, but for rounding."""
    two, four = tmp_path / "two", tmp_path / "four"
    two.mkdir()
    four.mkdir()
    ranks = run_processes(two, 2, "llama:qlora")
    shutil.copy(two / "llama qlora" / "sharded.ckpt", four / "resume.ckpt")
    others = run_processes(four, 4, "llama:qlora")
    one = in_one_process(
        tmp_path, "llama", ckpt_path=four / "llama qlora" / "sharded.ckpt", max_epochs=2
    )

    def means(found, name):
        return torch.tensor([rank[name]["losses"] for rank in found]).mean(0)

    def assert_close(weights, expected):
        assert weights.keys() == expected.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3)

    expected = means(ranks, "resumed sharded")
    for found in (means(others, "resumed other"), means(others, "resumed sharded")):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(one.losses), expected, rtol=0, atol=1e-5)
    weights = ranks[0]["resumed sharded"]["weights"]
    for found in (others[0]["resumed other"]["weights"], trained(one)["weights"]):
        assert_close(found, weights)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_codes_and_constants_are_views_of_bytes(kind, double):
    config = lightning_peft.engine.quantization_config(
        bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    backend = lightning_peft.engine.backend_for(config)
    # Neither the codes nor the blocks of constants fill their last unit.
    rows = torch.randn(67, 65, generator=torch.Generator().manual_seed(0))
    stored = backend.quantize(rows, config, torch.device("cpu"))
    packed = PackedWeight(backend, stored, torch.device("cpu"))
    octets = packed.release()
    assert octets.dtype == torch.uint8
    assert not octets.requires_grad
    assert octets.numel() == packed.size <= stored.numel() + stored.numel() // 8 + 64
    opened = packed.open(octets)
    assert opened.data_ptr() == octets.data_ptr()
    assert torch.equal(opened, stored)
    assert torch.equal(backend.dequantize(opened), backend.dequantize(stored))
    assert backend.weight_info(packed.template) == backend.weight_info(stored)
    assert packed.open(octets) is opened
    again = PackedWeight(backend, stored, torch.device("cpu"))
    part = again.release(Share(1, 3))
    with pytest.raises(LifecycleError, match="sharding='fsdp2' keeps 1/3 of it in this process"):
        again.open(part)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((5,), [2, 2, 1]), ((7, 3), [3, 3, 1]), ((2, 4), [1, 1, 0]), ((1,), [1, 0, 0])],
)
def test_parts_are_those_that_fsdp_gathers(shape, rows):
    whole = torch.arange(math.prod(shape)).view(shape)
    parts = [Share(rank, 3).of(whole, torch.device("cpu")) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert [len(part) for part in parts] == rows
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)


def test_what_a_user_leaves_out_of_ddp_stays_out():
    module = torch.nn.Linear(2, 2)
    module._ddp_params_and_buffers_to_ignore = {"bias"}
    for _ in range(2):
        leave_out_of_ddp(module, ["weight"])
    assert module._ddp_params_and_buffers_to_ignore == ["bias", "weight"]


def test_a_base_outside_of_blocks_is_noticed():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(1, 3, bias=False))
    for param in module.parameters():
        param.requires_grad_(False)
    frozen = [*module.parameters()]
    with pytest.warns(UserWarning, match="20 % of the frozen bytes are inside of blocks"):
        warn_of_few_blocks(frozen, [module[1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_blocks(frozen, [module[0]])


def test_layerdrop_cannot_be_sharded(tmp_path):
    module = task(ROOT, kind="llama")
    lightning_peft.engine.inject(module)
    module.model.config.layerdrop = 0.1
    with pytest.raises(UnsupportedError, match="layerdrop=0.1 in the config of the model"):
        lightning_peft.engine.check_shardable(module)


def test_attention_and_recurrent_layers_cannot_be_sharded():
    module = torch.nn.ModuleDict(
        {"attention": torch.nn.MultiheadAttention(8, 2), "gru": torch.nn.GRU(8, 8)}
    )
    lightning_peft.engine.inject(module, r=4, target_modules=["attention", "gru"])
    with pytest.raises(UnsupportedError, match=r"(?s)adapters on 'attention' .*adapters on 'gru'"):
        lightning_peft.engine.check_shardable(module)


REFUSED = {
    "fsdp1": ({"sharding": "fsdp1"}, "sharding='fsdp1': choose 'fsdp2'"),
    "budget": (
        {"sharding": "fsdp2", "gradient_checkpointing": "2GB"},
        "gradient_checkpointing='2GB': what a budget keeps",
    ),
    "one process shares": ({"sharding": "fsdp2", "dp_shard_size": 1}, "2 processes or more"),
    "8 bits": ({"sharding": "fsdp2", "load_in_8bit": True}, "load_in_8bit=True, whose scales"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_go_together(name):
    given, message = REFUSED[name]
    with pytest.raises(ConfigError, match="(?s)sharding=.*") as error:
        strategy("qlora", ROOT, **given)
    assert message in str(error.value)


@pytest.mark.parametrize("given", [{"dp_shard_size": 2}, {"offload": True}])
def test_arguments_of_sharding_alone(given, tmp_path):
    with pytest.raises(ConfigError, match="Give sharding='fsdp2' too"):
        strategy("lora", ROOT, **given)
    with pytest.raises(ConfigError, match="Give sharding='fsdp2' too"):
        lightning_peft.LoRACallback(**given)


def test_one_process_has_nothing_to_offload(tmp_path):
    run = trainer(tmp_path, strategy("lora", ROOT, sharding="fsdp2", offload=True), ROOT)
    # There already.
    run.fit(task(ROOT), loader())
    run.strategy._root_device = torch.device("cuda")
    module = task(ROOT, "configure_model")
    with pytest.raises(ConfigError, match="offload=True in one process on cuda"):
        run.fit(module, loader())
    assert module.model is None


def test_a_callback_cannot_shard():
    with pytest.raises(ConfigError, match="only a strategy can spread the base over processes"):
        lightning_peft.LoRACallback(sharding="fsdp2")


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        (
            "lora",
            {"r": 16, "peft_config": {"peft_type": "LORA", "lora_bias": True}},
            r"adapters in PEFT's own layers \(LORA\)",
        ),
        ("qlora", {"quantization_config": {"load_in_8bit": True}}, "8-bit weights of bitsandbytes"),
    ],
)
def test_modules_that_cannot_be_sharded(method, given, message, tmp_path):
    module = task(ROOT, kind="llama")
    run = trainer(tmp_path, strategy(method, ROOT, **given), ROOT, enable_checkpointing=False)
    run.fit(module, loader("llama"))
    with pytest.raises(UnsupportedError, match=message):
        lightning_peft.engine.check_shardable(module)


@pytest.mark.long
def test_processes_out_of_memory_are_started_again_with_smaller_batches(tmp_path):
    """At the first step, and at the fifth of six, for which there is a checkpoint of the fourth."""
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    script = [str(HERE / "restarted_processes.py"), str(tmp_path)]
    # Else processes look for the addresses of those that are gone.
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, *script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), **own_store},
        timeout=1200,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    for line in ("after optimizer step 0", "after optimizer step 4"):
        assert f"Out of memory {line} (CUDA out of memory.). torchrun starts all" in run.stderr
    for rank in (0, 1):
        first, later, smaller = (
            torch.load(tmp_path / f"{case}-{rank}.pt") for case in ("0", "4", "smaller")
        )
        assert first["rows"] == smaller["rows"] == [2] * 24
        assert not differing(first["weights"], smaller["weights"])
        assert (later["rows"], later["steps"]) == ([2] * 8, [*[4] * 4, *[5] * 4, 6])


@pytest.mark.long
def test_adalora_and_averages_train_the_same(run_processes, tmp_path):
    ranks = run_processes(tmp_path, 2, script="sharded_training.py")
    assert ranks[0].keys() == ranks[1].keys()
    assert len(ranks[0]) == 5
    assert not any(differing for rank in ranks for differing in rank.values())
