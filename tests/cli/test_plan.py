"""``lightning-peft plan`` on a folder that holds only a config."""

import json
from functools import partial

import pytest
from image_text_models import FAMILIES

from lightning_peft.cli.plan_config import device_count, plan_from_config
from lightning_peft.errors import ConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture
def plan(model, new_process):
    return partial(new_process, "plan")


@pytest.fixture
def here(model, in_process):
    return partial(in_process, "plan")


def test_json_alone_is_printed(plan):
    done = plan("--model", "model", "--method", "lora", "--gpu", "1GB", "--seq-len", "64", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    per_layer = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192)
    assert found["trainable_parameters"] == 2 * 16 * per_layer
    assert found["total_parameters"] > found["trainable_parameters"]
    assert sum(found["breakdown"].values()) == found["peak_bytes"]
    assert found["breakdown"]["adapters"] == 4 * found["trainable_parameters"]
    assert found["low_bytes"] < found["peak_bytes"] < found["high_bytes"]
    assert found["fits"] is True
    assert found["processes"] is None
    assert found["device"] == {"name": "1GB", "bytes": 10**9}
    assert found["largest_batch_size"] > 1
    assert found["longest_seq_len"] == 256
    assert set(found["methods"]) == {"full", "lora", "qlora"}
    kept = found["kept_for_backward"]
    assert kept["with_checkpointing"] < kept["without_checkpointing"]
    assert found["recommended_method"] == "lora"
    assert found["recommendation"].startswith("LoRA")
    assert "predicting lora" in done.stderr


def test_the_loss_of_the_task_has_no_logits_of_all_tokens(here, tmp_path):
    wide = {**CONFIG, "vocab_size": 1 << 16}
    (tmp_path / "model" / "config.json").write_text(json.dumps(wide))
    words = ["--model", "model", "--batch-size", "8", "--seq-len", "256", "--no-limits", "--json"]
    by_parts, whole = (json.loads(here(*words, *more).stdout) for more in ([], ["--logits", "all"]))
    assert (by_parts["run"]["logits"], whole["run"]["logits"]) == ("chunked", "all")
    # 256 of 2,048 tokens at a time: in bfloat16, as their gradient; and a piece of them in float32.
    logits = by_parts["breakdown"]["logits"] - 256 * (1 << 16) * (2 + 2)
    assert 0 < logits <= 8 << 20
    assert 0 < whole["breakdown"]["logits"] - 2048 * (1 << 16) * (2 + 2) <= 8 << 20


def test_the_loss_of_a_model_that_is_no_language_model_is_its_own(here, tmp_path):
    classes = {**CONFIG, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(classes))
    done = here("--model", "model", "--seq-len", "32", "--no-limits", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"]["logits"] == "all"


def test_plain_lines_where_there_is_no_terminal(here):
    words = ["--batch-size", "2", "--seq-len", "32", "--r", "8", "--target-modules", "q_proj"]
    done = here("--model", "model", *words, "--gradient-checkpointing", "off", "--no-limits")
    assert done.returncode == 0, done.stderr
    assert "qlora, batch_size=2, seq_len=32, gradient checkpointing off" in done.stdout
    assert f"trainable {2 * 8 * (64 + 64):,} of" in done.stdout
    assert "quantized weights" in done.stdout
    assert "logits are computed in chunks, as in the task CausalLM" in done.stdout
    assert "\x1b" not in done.stdout


def test_bad_input_is_answered_with_2(here, refused):
    done = here("--model", "nowhere", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--model 'nowhere': no config of transformers could be read there" in done.stderr
    assert "near names: rtx4090" in refused("plan", "--model", "model", "--gpu", "rtx4091")
    said = refused("plan", "--model", "model", "--seq-len", "0", "--optimizer", "adam_8bit")
    assert "seq_len=0" in said
    assert "adamw_8bit" in said


def test_a_layer_that_is_not_there_is_answered_with_1(here, refused):
    words = ["--model", "model", "--target-modules", "q_prj"]
    assert "q_prj" in refused("plan", *words, code=1)


def test_the_run_of_a_recipe_is_planned_with_its_overrides(here, refused):
    words = ["--config=sft-qlora", "--model.init_args.model=model", "--no-limits", "--json"]
    more = ["--trainer.strategy.init_args.r=4", "--data.init_args.max_length=32"]
    done = here(*words, *more, "--data.init_args.batch_size", "2", "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    by_hand = here(
        "--model=model", "--method=qlora", "--r=4", "--seq-len=32", "--batch-size=2",
        "--accumulate=2", "--precision=bf16-mixed", "--no-limits", "--json",
    )  # fmt: skip
    assert json.loads(done.stdout) == json.loads(by_hand.stdout)
    said = refused("plan", *words, "--trainer.strategy.init_args.rank=4")
    assert "'rank' is not an argument of QLoRAStrategy; near names: " in said
    for given, kind in (("load_in_8bit=true", "int8"), ("bnb_4bit_use_double_quant=false", "nf4")):
        problem = f"quantized as {kind}, and this command plans for NF4 with"
        with pytest.raises(ConfigError, match=problem):
            plan_from_config(["sft-qlora"], [f"--trainer.strategy.init_args.{given}"])
    words = ["--config=text-classification-lora", "--model.init_args.model=model"]
    assert "is not a task that is planned" in refused("plan", *words)


def test_images_are_counted_as_the_processor_makes_them(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    processor = FAMILIES["llava"].processor()
    processor.save_pretrained(tmp_path / "seeing")
    image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    rows = [
        {"prompt": f"{'<image>' * n}What is it?", "completion": "Red.", "images": ["a.png"] * n}
        for n in (3, 1)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [{"type": "image"}] * 3 + [{"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": parts}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]
    # A row ends with its end token.
    text = processor.apply_chat_template(turns).rstrip("\n")
    made = processor(text=[text], images=[[image.open("a.png")] * 3])["input_ids"][0]
    seen = made.count(processor.image_token_ids[0])
    assert seen == 3 * 4
    words = ["--model.init_args.model=seeing", "--data.init_args.processor=seeing"]

    def planned(*more, length=True):
        return plan_from_config(["image-text-to-text-lora"], [*words, *more], length)

    assert f"--seq-len={len(made)}" in planned("--data.init_args.data=rows.jsonl")
    note = f"the longest of 2 rows has {len(made)} tokens, {seen} of images. --seq-len plans for"
    assert note in capsys.readouterr().err
    absent = "--data.init_args.data=none.jsonl"
    assert "--seq-len=96" in planned(absent, "--data.init_args.max_length=96")
    assert "cannot be read (There is no file or folder 'none.jsonl'" in capsys.readouterr().err
    assert "--seq-len=4096" in planned(absent)
    assert "so they are taken as of 4,096 tokens" in capsys.readouterr().err
    assert not [word for word in planned(absent, length=False) if word.startswith("--seq-len")]
    assert "note:" not in capsys.readouterr().err


def test_several_gpus_and_nodes(here, refused):
    words = ["--model", "model", "--seq-len", "32", "--no-limits", "--gpus", "4", "--nodes", "2"]
    shared = [*words, "--gpu", "h100", "--sharding", "fsdp2"]
    found = json.loads(here(*shared, "--link-bandwidth", "0.001", "--json").stdout)
    assert sum(found["breakdown"].values()) == found["peak_bytes"]
    several = found["processes"]
    assert (several["gpus"], several["nodes"], several["sharding"]) == (4, 2, "fsdp2")
    assert (several["tflops"], several["link_bandwidth"]) == (989, 0.001)
    assert several["sent_in_a_step"] == (
        (several["gathered_in_a_step"] + 2 * several["averaged_in_a_step"]) * 7 // 8
    )
    seconds = several["least_seconds"]
    assert seconds[several["bound"]] == max(seconds.values()) > 0
    assert several["bound"] == "interconnect"
    full = ["--method", "full", "--sharding", "fsdp2"]
    text = here(*words, *full, "--gpu", "1GB", "--tflops", "9").stdout
    # There is no frozen base to share.
    assert "8 processes (2 x 4 GPUs), a whole base on each: memory and batch are those" in text
    assert "give a --gpu by name, or --memory-bandwidth, --link-bandwidth, --network-ban" in text
    assert "gpus=0: a number above 0" in refused("plan", *words, "--gpus", "0")


@pytest.mark.long
@pytest.mark.parametrize(("nodes", "more"), [("2", ", 1e+06 GB/s from node to node"), ("1", "")])
def test_the_bounds_of_a_step_are_shown(here, nodes, more):
    words = ["--model", "model", "--seq-len", "32", "--no-limits", "--gpus", "4", "--nodes", nodes]
    speed = ["--gpu", "h100", "--tflops", "0.001", "--network-bandwidth", "1e6"]
    text = here(*words, "--sharding", "fsdp2", *speed).stdout
    assert f"{4 * int(nodes)} processes ({nodes} x 4 GPUs), sharding='fsdp2': memory and" in text
    assert "bound by compute: GPUs of 0.001 TFLOP/s with 3350 GB/s of memory" in text
    assert f"of memory, and 450 GB/s within a node{more}\n" in text
    assert "weights gathered to compute with" in text


def test_gpus_are_counted_as_the_trainer_counts_devices(capsys):
    counts = {"2": 2, "0,1": 2, "2,": 1, "auto": None, "-1": None}
    assert {text: device_count(text) for text in counts} == counts
    assert [device_count(given) for given in ([0, 3], 4, -1, None)] == [2, 4, None, None]

    def planned(devices, *more):
        given = [f"--trainer.strategy.init_args.{one}" for one in ("sharding=fsdp2", *more)]
        return plan_from_config(["sft-qlora"], [model, *given, f"--trainer.devices={devices}"])

    model = "--model.init_args.model=x/y"
    assert "--gpus=2" in planned("2")
    assert not capsys.readouterr().err
    assert not [word for word in planned("auto") if word.startswith("--gpus")]
    assert "trainer.devices='auto' depends on the machine, so one GPU" in capsys.readouterr().err
    # Those that share a base; the others add nothing to a GPU's memory.
    assert "--gpus=2" in planned("8", "dp_shard_size=2", "offload=true")
    notes = capsys.readouterr().err
    assert "dp_shard_size=2: the 2 GPUs that share a base are planned for" in notes
    assert "offload=True: the plan has the parts of the base on the GPU" in notes
