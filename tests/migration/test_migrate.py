"""``lightning-peft migrate``: what the rules find, the changes, and what is never touched."""

import ast
import io
import json
import subprocess
from pathlib import Path

import pytest

from lightning_peft.cli import main
from lightning_peft.errors import ConfigError
from lightning_peft.migration.edits import as_diff, new_texts, require_clean_tree, write
from lightning_peft.migration.rules import RULES
from lightning_peft.migration.scan import scan

MODULE = '''\
"""A classifier."""

import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model


class Classifier(pl.LightningModule):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"], task_type="CAUSAL_LM")
        self.encoder = get_peft_model(self.encoder, config)
        self.encoder.print_trainable_parameters()

    def on_save_checkpoint(self, checkpoint):
        for name in list(checkpoint["state_dict"]):
            try:
                if not self.get_parameter(name).requires_grad:
                    del checkpoint["state_dict"][name]
            except AttributeError:
                del checkpoint["state_dict"][name]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
'''
SCRIPT = """\
import pytorch_lightning as pl
from model import Classifier

trainer = pl.Trainer(max_epochs=3, strategy="ddp", devices=2)
model = Classifier.load_from_checkpoint("old.ckpt", strict=False)
trainer.fit(model)
"""
LORA = "r=8, lora_alpha=16, target_modules=['q', 'v'], adapt='encoder'"


def code_base(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def rules_of(path):
    found = {}
    for one in scan(path).findings:
        found.setdefault(one.rule, []).append(one.place.line)
    return found


# Each: code, the rule, its line, and a word of what is reported.
FOUND = {
    "kbit": ("peft.prepare_model_for_kbit_training(m)", "kbit-preparation", 1, "float32"),
    "wrapper": ("with m.disable_adapter():\n    pass", "peft-wrapper-use", 1, "disable_adapters"),
    "path": ("x = m.llm.base_model.model.model.layers", "peft-path", 1, "identity"),
    "filter": (
        "class A:\n    def configure_optimizers(self):\n        return Adam([p for n, p in"
        " self.named_parameters() if 'lora' in n])",
        "optimizer", 3, "no `lora` in their names",
    ),
    "doubled": (
        "class A:\n    def configure_optimizers(self):\n        a = SGD(self.parameters())\n"
        "        b = SGD(self.head.parameters())\n        return [a, b]",
        "optimizer", 4, "two optimizers step it twice",
    ),
    "early": (
        "import torch\nclass A:\n    def __init__(self):\n        self.o = torch.optim.SGD(p)",
        "early-optimizer", 4, "nothing",
    ),
    "renaming": (
        "class A:\n    def on_load_checkpoint(self, c):\n        s = c['state_dict']\n"
        "        c['state_dict'] = {k.replace('module.', ''): v for k, v in s.items()}",
        "checkpoint-hook", 2, "lightning-peft import",
    ),
    "parameters only": (
        "class A:\n    def on_save_checkpoint(self, c):\n        c['state_dict'] = {n: p for n, p"
        " in self.named_parameters() if p.requires_grad}",
        "checkpoint-hook", 2, "batch norm",
    ),
    "callback": (
        "class C(ModelCheckpoint):\n    def _save_checkpoint(self, trainer, path):\n"
        "        trainer.model.llm.save_pretrained(path)",
        "checkpoint-callback", 1, "no optimizer state",
    ),
    "strict": ("m.load_state_dict(c['state_dict'], strict=False)", "strict-false", 1, "ckpt_path="),
    "strict_loading": ("class A:\n    strict_loading = False", "strict-false", 2, "strict"),
    "fsdp": ("s = FSDPStrategy(cpu_offload=True)", "sharded-strategy", 1, "fsdp2"),
    "own": (
        "class S(DDPStrategy):\n    def load_model_state_dict(self, checkpoint):\n"
        "        self.model.load_state_dict(checkpoint['state_dict'], strict=False)",
        "own-strategy", 2, "Lightning passes `strict`, which raises a TypeError",
    ),
    "by hand": ("fully_shard(block)", "sharding-by-hand", 1, "repeated blocks"),
    "tensor parallel": ("parallelize_module(m, mesh, plan)", "sharding-by-hand", 1, "refused"),
    "bnb": ("p = BitsandbytesPrecision(mode='int8')", "bitsandbytes-precision", 1, "load_in_8bit"),
    "config": ("BitsAndBytesConfig(load_in_4bit=True)", "quantization-config", 1, "recognised"),
    "argument": (
        "M.from_pretrained('x', load_in_8bit=True)", "quantization-argument", 1, "transformers 5",
    ),
    "map": ("M.from_pretrained('x', device_map='auto')", "device-map", 1, "all devices"),
    "gptq": ("GPTQConfig(bits=4)", "other-quantization", 1, "dense model"),
    "merge": ("m = m.merge_and_unload()", "merge", 1, "lightning-peft merge"),
    "zero": ("get_fp32_state_dict_from_zero_checkpoint('c')", "zero-conversion", 1, "import"),
    "qkv": ("def split(a):\n    return a.qkv.weight[:64]", "qkv-split", 2, "fused layer"),
    "encoder": (
        "class E(nn.TransformerEncoderLayer):\n    def forward(self, x): return x",
        "rewritten-encoder-layer", 1, "out_proj",
    ),
    "ema": ("c = EMAWeightAveraging(decay=0.9)", "weight-average", 1, "nothing"),
    "other ema": ("e = ExponentialMovingAverage(p)", "weight-average", 1, "4-bit codes"),
    "swa": ("c = StochasticWeightAveraging(0.1)", "weight-average", 1, "batch norms"),
    "saving": (
        "class A(LightningModule):\n    def save(self, path):\n"
        "        torch.save({'model': self.state_dict()}, path)",
        "saving-by-hand", 2, "cannot be resumed",
    ),
    "unfreeze": ("c = BackboneFinetuning()", "unfreezing", 1, "never the base"),
    "unfreeze by a class": (
        "class A(pl.callbacks.BaseFinetuning):\n    def freeze_before_training(self, m):\n"
        "        m.net.unfreeze()",
        "unfreezing", 1, "never the base",
    ),
    "stage": (
        "class A:\n    def on_train_epoch_start(self):\n        self.net.unfreeze()",
        "unfreezing-by-hand", 3, "modules_to_save",
    ),
    "load": ("m = Net.load_from_checkpoint(p)", "load-from-checkpoint", 1, "import them once"),
    "peft": ("m = get_peft_model(net, make())", "peft-wrapping", 1, "peft_config"),
    "in place": (
        "import peft\nm = peft.inject_adapter_in_model(config, net)",
        "peft-wrapping", 2, "only get_peft_model",
    ),
    "constructor": (
        "from peft.peft_model import PeftModelForCausalLM\nm = PeftModelForCausalLM(net, config)",
        "peft-wrapping", 2, "LoRAStrategy",
    ),
    "of transformers": (
        "from peft import LoraConfig as C\nconfig = C(r=2)\nm.add_adapter(config)",
        "peft-wrapping", 3, "LoRAStrategy",
    ),
    "folder": (
        "import peft\npeft.AutoPeftModelForCausalLM.from_pretrained(p)",
        "adapter-loading", 2, "may stay",
    ),
    "folder that trains": (
        "from peft import PeftModel\nm = PeftModel.from_pretrained(m, p, is_trainable=True)",
        "adapter-loading", 2, "load_adapter",
    ),
    "ddp": ("s = DDPStrategy(static_graph=True)", "ddp-strategy", 1, "{'static_graph': True}"),
    "spawn": ("s = DDPStrategy(start_method='spawn')", "ddp-strategy", 1, "would be lost"),
    "own fsdp": ("class S(FSDPStrategy):\n    pass", "sharded-strategy", 1, "fsdp2"),
    "cleared": (
        "class A:\n    def on_save_checkpoint(self, c):\n        c.clear()\n        c |= lora",
        "checkpoint-hook", 2, "cannot be resumed",
    ),
    "own folders": (
        "class A(LightningModule):\n    def on_train_epoch_end(self):\n"
        "        self.model.save_pretrained('x')",
        "saving-by-hand", 2, "may stay",
    ),
    "argument of a class": (
        "class Net(LightningModule): pass\nm = Net('x', load_in_4bit=args.four)",
        "quantization-argument", 2, "QLoRAStrategy",
    ),
    "pretrained part": ("vit.load_state_dict(s, strict=False)", "strict-false", 1, "may stay"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_each_rule_finds_its_code(tmp_path, kind):
    code, rule, line, word = FOUND[kind]
    code_base(tmp_path, code=code)
    (one,) = [one for one in scan(tmp_path).findings if one.rule == rule]
    assert one.place.line == line
    assert word in f"{one.problem} {one.becomes}"


def test_a_stage_with_a_setup_of_its_own_is_not_served(tmp_path):
    code_base(
        tmp_path,
        code="class A(BaseFinetuning):\n    def freeze_before_training(self, m):\n"
        "        m.requires_grad_()\n\nclass B(A):\n    def setup(self, *given): pass\n",
    )
    found = [(one.rule, one.found, one.served) for one in scan(tmp_path).findings]
    assert found == [("unfreezing", "class A", "partly"), ("unfreezing", "class B", "no")]


def test_every_rule_is_in_the_table_above():
    assert {rule.name for rule in RULES} == {rule for _, rule, _, _ in FOUND.values()}


def test_plain_lightning_code_has_no_findings(tmp_path):
    code_base(
        tmp_path,
        plain="""
import pytorch_lightning as pl
import torch

class Net(pl.LightningModule):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["words"] = self.words

    def configure_optimizers(self):
        decay = [p for n, p in self.named_parameters() if "no_decay" not in n]
        return torch.optim.AdamW(decay)

trainer = pl.Trainer(max_epochs=1, strategy="ddp")
scores = features.weight[:4]

class Settings:
    pass

settings = Settings.load_from_checkpoint("x")

class Warmup(torch.optim.lr_scheduler.LRScheduler):
    def state_dict(self):
        return {k: v for k, v in self.__dict__.items() if k != "optimizer"}

def get_base_model(folder):
    return M.from_pretrained(folder, device_map={"": 0}, quantization_config=None)

def attend(x, in_proj_weight):
    return F.linear(get_base_model(x, load_in_8bit=False), in_proj_weight[:4])

tokenizer.save_pretrained(folder)
pipeline.add_adapter(other)
for a, b in zip(x, y, strict=False):
    pass
""",
    )
    assert scan(tmp_path).findings == []


def test_a_module_and_its_trainer_change_together(tmp_path):
    code_base(tmp_path, model=MODULE, train=SCRIPT)
    changed, by_hand = new_texts(scan(tmp_path).findings)
    assert by_hand == []
    model, train = (changed[tmp_path / name][1] for name in ("model.py", "train.py"))
    assert "peft" not in model
    assert "on_save_checkpoint" not in model
    assert "self.encoder = encoder\n\n    def configure_optimizers" in model
    assert train == (
        "import pytorch_lightning as pl\n"
        "from model import Classifier\n"
        "from lightning_peft import LoRAStrategy, load_from_checkpoint\n"
        "\n"
        f"trainer = pl.Trainer(max_epochs=3, strategy=LoRAStrategy({LORA}), devices=2)\n"
        "model = load_from_checkpoint(Classifier, 'old.ckpt')\n"
        "trainer.fit(model)\n"
    )
    for text in (model, train):
        ast.parse(text)


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ("pl.Trainer(**settings)", "takes arguments that are not written there"),
        ("pl.Trainer(strategy=Own())", "has a strategy of its own"),
        ("pl.Trainer(strategy=DDPStrategy(timeout=t))", "has a strategy of its own"),
        ("pl.Trainer(strategy='ddp_spawn')", "has a strategy of its own"),
        ("[pl.Trainer(), pl.Trainer()]", "2 calls of Trainer"),
        ("transformers.Trainer()", "no call of Trainer"),
    ],
)
def test_without_a_clear_trainer_the_wrapping_is_left_to_a_person(tmp_path, trainer, reason):
    code_base(tmp_path, model=MODULE, train=f"import pytorch_lightning as pl\nt = {trainer}\n")
    found = scan(tmp_path).findings
    (wrapping,) = [one for one in found if one.rule == "peft-wrapping"]
    assert reason in wrapping.becomes
    assert not wrapping.mechanical
    assert new_texts(found) == ({}, [])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("plugins=BitsandbytesPrecision('nf4-dq')", "strategy=QLoRAStrategy({})"),
        (
            "max_steps=2, plugins=BitsandbytesPrecision(mode='fp4-dq'), strategy='auto'",
            "max_steps=2, strategy=QLoRAStrategy({}, bnb_4bit_quant_type='fp4')",
        ),
        ("strategy='fsdp'", "strategy=LoRAStrategy({}, sharding='fsdp2')"),
        ("strategy='deepspeed_stage_2'", "strategy=LoRAStrategy({})"),
        ("strategy='deepspeed_stage_3_offload'", "strategy=LoRAStrategy({}, sharding='fsdp2')"),
        (
            "strategy=DDPStrategy(find_unused_parameters=True), devices=2",
            "strategy=LoRAStrategy({}, ddp_kwargs={{'find_unused_parameters': True}}), devices=2",
        ),
        (
            "strategy='ddp_find_unused_parameters_true'",
            "strategy=LoRAStrategy({}, ddp_kwargs={{'find_unused_parameters': True}})",
        ),
    ],
)
def test_strategies_and_plugins_become_one_argument(tmp_path, before, after):
    start = "import pytorch_lightning as pl\nfrom pytorch_lightning.plugins import "
    start += "BitsandbytesPrecision\n"
    code_base(tmp_path, model=MODULE, train=f"{start}pl.Trainer({before}).fit(m)\n")
    changed, _ = new_texts(scan(tmp_path).findings)
    text = changed[tmp_path / "train.py"][1]
    assert f"pl.Trainer({after.format(LORA)}).fit(m)\n" in text
    # What was not used before stays.
    assert ("BitsandbytesPrecision" in text) == ("Bitsandbytes" not in before)


def test_encodings_ends_of_lines_and_blocks_survive(tmp_path):
    text = (
        "# -*- coding: latin-1 -*-\r\n"
        "import pytorch_lightning as pl\r\n"
        "from peft import LoraConfig, get_peft_model\r\n"
        "class Net(pl.LightningModule):\r\n"
        "    def __init__(self):\r\n"
        "        self.net = get_peft_model(make(), LoraConfig(target_modules='q'))\r\n"
        "name = 'Zürich'; x = Net.load_from_checkpoint('ü.ckpt')\r\n"
        "pl.Trainer().fit(x)\r\n"
    )
    (tmp_path / "latin.py").write_bytes(text.encode("latin-1"))
    changed, _ = new_texts(scan(tmp_path).findings)
    write(changed)
    assert (tmp_path / "latin.py").read_bytes().decode("latin-1") == (
        "# -*- coding: latin-1 -*-\r\n"
        "import pytorch_lightning as pl\r\n"
        "from lightning_peft import LoRAStrategy, load_from_checkpoint\r\n"
        "class Net(pl.LightningModule):\r\n"
        "    def __init__(self):\r\n"
        "        self.net = make()\r\n"
        "name = 'Zürich'; x = load_from_checkpoint(Net, 'ü.ckpt')\r\n"
        "pl.Trainer(strategy=LoRAStrategy(r=8, lora_alpha=8, target_modules='q', adapt='net'))"
        ".fit(x)\r\n"
    )


def test_what_cannot_be_parsed_is_named_and_the_rest_is_read(tmp_path, capsys):
    code_base(tmp_path, fine="m.merge_and_unload()", old="print 'x'")
    (tmp_path / "null.py").write_bytes(b"x = 1\0")
    (tmp_path / "odd.py").write_bytes(b"# coding: no-such-code\n")
    (tmp_path / "book.ipynb").write_text("{}", encoding="utf-8")
    found = scan(tmp_path)
    assert [one.rule for one in found.findings] == ["merge"]
    assert [Path(line.partition(":")[0]).name for line in found.unreadable] == [
        *("book.ipynb", "null.py", "odd.py", "old.py"),
    ]
    assert main(["migrate", str(tmp_path)]) == 1
    assert "old.py:1: " in capsys.readouterr().out


def test_notebooks_are_read_by_cell_and_never_written(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# merge_and_unload()"]},
        {
            "cell_type": "code",
            "source": [
                "%pip install x \\\n",
                "  y\n",
                "!ls\n",
                MODULE,
            ],
        },
        {"cell_type": "code", "source": "%%bash\nmerge_and_unload()"},
        {"cell_type": "code", "source": "path = %env HOME\n! a \\\r\n  b\r\npip install peft"},
        {"cell_type": "code", "source": ["x = 1\n", "print 'x'"]},
        {"cell_type": "code", "source": ["a = 2\n", "Classifier.load_from_checkpoint('x')"]},
        {"cell_type": "code", "source": "pl.Trainer().fit(m)"},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    found = scan(tmp_path)
    (one,) = [one for one in found.findings if one.rule == "load-from-checkpoint"]
    assert str(one.place).endswith("a.ipynb:cell 5:2")
    assert [line.rpartition("/")[2].partition(": ")[0] for line in found.unreadable] == [
        "a.ipynb:cell 4:2"
    ]
    changed, by_hand = new_texts(found.findings)
    assert changed == {}
    assert "notebooks are not written" in by_hand[0]


def test_yaml_of_lightning_cli_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "trainer:\n  strategy: deepspeed_stage_2\n  callbacks:\n"
        "    - _target_: lightning.pytorch.callbacks.EMAWeightAveraging\n"
        "    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging\n"
        "model:\n  init_args:\n    strict_loading: false\n",
        encoding="utf-8",
    )
    assert rules_of(tmp_path) == {
        "sharded-strategy": [2],
        "weight-average": [4, 5],
        "strict-false": [8],
    }


def git(folder, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, timeout=60)


def test_writing_needs_a_clean_git_tree(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code_base(tmp_path, model=MODULE, train=SCRIPT)
    with pytest.raises(ConfigError, match="is not in a git tree"):
        require_clean_tree(tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(ConfigError, match="has changes that are not committed"):
        require_clean_tree(tmp_path)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "start")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["migrate", str(tmp_path), "--write"]) == 2
    assert (tmp_path / "train.py").read_text("utf-8") == SCRIPT
    assert "add --yes" in capsys.readouterr().err
    assert main(["migrate", str(tmp_path), "--write", "--yes"]) == 1
    assert rules_of(tmp_path) == {}
    assert main(["migrate", str(tmp_path)]) == 0


def test_the_printed_diff_applies(tmp_path, monkeypatch, capsys):
    code_base(tmp_path, model=MODULE, train=SCRIPT.rstrip("\n"))
    monkeypatch.chdir(tmp_path)
    assert main(["migrate", ".", "--diff"]) == 1
    (tmp_path / "it.diff").write_text(capsys.readouterr().out, encoding="utf-8")
    subprocess.run(["git", "apply", "it.diff"], check=True, timeout=60, cwd=tmp_path)
    assert "strategy=LoRAStrategy(r=8" in (tmp_path / "train.py").read_text("utf-8")


def test_json_has_all_that_the_text_has(tmp_path, capsys):
    code_base(tmp_path, model=MODULE, train=SCRIPT)
    assert main(["migrate", str(tmp_path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == 2
    wrapping = next(one for one in said["findings"] if one["rule"] == "peft-wrapping")
    assert (wrapping["line"], wrapping["served"], wrapping["mechanical"]) == (13, "yes", True)
    assert "+trainer = pl.Trainer" in said["diff"]


def test_nothing_to_read_is_bad_input(tmp_path, refused):
    assert main(["migrate", str(tmp_path / "absent")]) == 2
    assert "has no Python files" in refused("migrate", str(tmp_path))


def test_an_empty_diff_of_nothing(tmp_path):
    assert as_diff({}) == ""


def test_every_rule_is_on_the_page():
    page = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text("utf-8")
    assert [rule.name for rule in RULES if f"| `{rule.name}` |" not in page] == []
