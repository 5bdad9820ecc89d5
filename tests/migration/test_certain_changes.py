"""``migrate`` changes what is certain from the code alone; the rest is left to a person."""

import ast
import os

import pytest

from lightning_peft.cli import main
from lightning_peft.migration.edits import new_texts
from lightning_peft.migration.finding import Edit, Finding
from lightning_peft.migration.scan import scan
from lightning_peft.migration.source import read_code_base
from tests.migration.test_migrate import LORA, MODULE, SCRIPT, code_base, git

WRAPPED = "self.encoder = get_peft_model(self.encoder, config)"


def wrapping(path):
    found = scan(path).findings
    (one,) = [one for one in found if one.rule == "peft-wrapping"]
    return one, new_texts(found)


def replaced(old, new):
    assert old in MODULE
    return MODULE.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("print_trainable_parameters", "get_base_model", "need PEFT's wrapper"),
        (
            "self.encoder.print_trainable_parameters()",
            "x = self.encoder.print_trainable_parameters()",
            "need PEFT's wrapper",
        ),
        ("LoraConfig", "AdaLoraConfig", "peft_config=..."),
        ("r=8", "r=rank", "peft_config=..."),
        ("r=8", "r=8, use_qalora=True", "peft_config=..."),
        ("CAUSAL_LM", "SEQ_CLS", "peft_config=..."),
        ("(self.encoder, config)", "(self.encoder, config, 'name')", "peft_config=..."),
        ("(self.encoder, config)", "(self.encoder, config, mixed=True)", "peft_config=..."),
        ("        config = ", "        if True: config = ", "peft_config=..."),
        ('target_modules=["q", "v"], ', "", "by the architecture"),
        ("from peft import", "from .peft import", "not imported from peft"),
        (WRAPPED, f"if True:\n            {WRAPPED}", "in a branch"),
        (WRAPPED, f"lora and {WRAPPED[15:]}", "an expression that may not run"),
        (WRAPPED, f"def later():\n            {WRAPPED}", "a function, which may not run"),
        ("__init__(self, encoder)", "add_lora(self, encoder)", "add_lora may not run"),
        ("(pl.LightningModule)", "(torch.nn.Module)", "__init__ may not run"),
        (
            "        self.encoder = encoder\n",
            "        self.encoder = encoder\n        if not lora:\n            return\n",
            "may return before it",
        ),
        (
            "class Classifier",
            "class T(pl.LightningModule): x = 1\n\nclass Classifier",
            "Module: T)",
        ),
    ],
)
def test_a_wrapping_that_is_not_plain_is_left_to_a_person(tmp_path, old, new, reason):
    code_base(tmp_path, model=replaced(old, new), train=SCRIPT)
    one, (changed, _) = wrapping(tmp_path)
    assert reason in one.becomes
    assert not one.mechanical
    assert changed == {}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("r=8, lora_alpha=16", "lora_dropout=0.1", "r=8, lora_alpha=8, lora_dropout=0.1, "),
        (WRAPPED, f"{WRAPPED}.train()", "self.encoder = self.encoder.train()\n"),
        (WRAPPED, WRAPPED.replace("(self.encoder", "(encoder or f()"), "= (encoder or f())\n"),
        (f"        {WRAPPED}", f"        x = f({WRAPPED[15:]})", "['q', 'v'])"),
    ],
)
def test_the_change_does_what_the_code_did(tmp_path, old, new, expected):
    code_base(tmp_path, model=replaced(old, new), train=SCRIPT)
    _, (changed, by_hand) = wrapping(tmp_path)
    assert by_hand == []
    assert expected in "".join(text for _, text in changed.values())


@pytest.mark.parametrize(
    "code",
    [
        "from lightning.pytorch.cli import LightningCLI\nLightningCLI(Classifier)",
        "import hydra\nt = hydra.utils.instantiate(settings.trainer)",
        "import pytorch_lightning as pl\nclass Own(pl.Trainer): pass",
        "import functools, pytorch_lightning as pl\nmake = functools.partial(pl.Trainer)",
        "settings = {'_target_': 'pytorch_lightning.Trainer'}",
        "from lightning.fabric import Fabric\nf = Fabric()",
        "from pytorch_lightning import *",
        "from own import Trainer\nt = Trainer()",
    ],
)
def test_where_another_trainer_may_be_made_nothing_changes(tmp_path, code):
    code_base(tmp_path, model=MODULE, train=SCRIPT, zz=code)
    one, (changed, _) = wrapping(tmp_path)
    assert f"zz.py:{code.count(chr(10)) + 1} may make another Trainer" in one.becomes
    assert changed == {}


def test_trainers_of_yaml_and_those_that_do_not_fit_count(tmp_path):
    code_base(tmp_path, model=MODULE, train=SCRIPT.replace("fit", "test"))
    assert "no call of fit" in wrapping(tmp_path)[0].becomes
    code_base(tmp_path, train=f"{SCRIPT}\ndef f(t: pl.Trainer) -> 'pl.Trainer': return t\n")
    assert wrapping(tmp_path)[0].mechanical
    (tmp_path / "a.yaml").write_text("a:\n  _target_: pytorch_lightning.Trainer\n", "utf-8")
    assert "a.yaml:2 may make another Trainer" in wrapping(tmp_path)[0].becomes


@pytest.mark.parametrize(
    "argument", ["strategy='fsdp'", "plugins=BitsandbytesPrecision('nf4')", "strategy='auto'"]
)
def test_training_without_adapters_stays_what_it_is(tmp_path, argument):
    hook = MODULE[MODULE.index("    def on_save") : MODULE.index("    def configure")]
    start = "import pytorch_lightning as pl\nfrom pytorch_lightning.plugins import "
    start += f"BitsandbytesPrecision\nclass Net(pl.LightningModule):\n{hook}"
    code_base(tmp_path, train=f"{start}pl.Trainer({argument}).fit(Net())\n")
    found = scan(tmp_path).findings
    assert all("there is no get_peft_model here" in one.becomes for one in found)
    assert not any(one.mechanical for one in found)
    assert new_texts(found) == ({}, [])


HOOK = """\
    def on_save_checkpoint(self, checkpoint):
        keep = {n for n, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep}
"""


@pytest.mark.parametrize(
    ("old", "new", "stays"),
    [
        ("", "", False),
        ("keep}\n", "keep}\n        torch.save(self.words, 'words.pt')\n", True),
        ("keep}\n", "keep}\n        self.saved = True\n", True),
        ("keep}\n", "keep}\n        self.names.append(self.name)\n", True),
        ("keep}\n", "keep}\n        done = torch.save(self.words, 'words.pt')\n", True),
        ("k: v for", "k: v.half() for", True),
        ('checkpoint["state_dict"].items()', "self.other.items()", True),
        ("(self, checkpoint)", "(*checkpoint)", True),
    ],
)
def test_a_hook_that_does_more_stays(tmp_path, old, new, stays):
    hook = HOOK.replace(old, new, 1)
    start, end = MODULE.index("    def on_save"), MODULE.index("    def configure")
    code_base(tmp_path, model=f"{MODULE[:start]}{hook}\n{MODULE[end:]}", train=SCRIPT)
    changed = new_texts(scan(tmp_path).findings)[0]
    text = changed[tmp_path / "model.py"][1]
    assert "get_peft_model" not in text
    assert ("on_save_checkpoint" in text) == stays


@pytest.mark.parametrize(
    "line",
    [
        "from .peft_tools import helper",
        "from .peft import get_peft_model",
        "from peft import TaskType; import os",
        "from peft_registry import register_all",
        "from peft import PeftConfig",
        "from peft import (PeftConfig, VeraConfig)  # for others\n__all__ = ['LoraConfig']",
    ],
)
def test_imports_of_other_use_stay(tmp_path, line):
    code_base(tmp_path, model=replaced("torch\n", f"torch\n{line}\n"), train=SCRIPT)
    text = new_texts(scan(tmp_path).findings)[0][tmp_path / "model.py"][1]
    assert f"\n{line}\n" in text
    assert "from peft import LoraConfig, get_peft_model\n" not in text


def test_the_import_comes_before_its_first_use(tmp_path):
    train = f"{SCRIPT}\n# %%\nimport torch\n"
    code_base(tmp_path, model=MODULE, train=train)
    text = new_texts(scan(tmp_path).findings)[0][tmp_path / "train.py"][1]
    assert text.startswith("import pytorch_lightning as pl\nfrom model import Classifier\nfrom li")


def test_carriage_returns_end_lines(tmp_path):
    trees = []
    for newline in ("\n", "\r\r\n"):
        for name, text in (("model", MODULE), ("train", SCRIPT)):
            (tmp_path / f"{name}.py").write_bytes(text.replace("\n", newline).encode())
        changed = new_texts(scan(tmp_path).findings)[0]
        assert len(changed) == 2
        trees.append([ast.dump(ast.parse(text)) for _, text in changed.values()])
    assert trees[0] == trees[1]


def test_a_function_of_which_nothing_is_left_passes(tmp_path):
    text = MODULE.replace("        config =", "\n    def setup(self, stage):\n        config =")
    code_base(tmp_path, model=text, train=SCRIPT)
    text = new_texts(scan(tmp_path).findings)[0][tmp_path / "model.py"][1]
    assert "    def setup(self, stage):\n        pass\n\n    def configure" in text


def test_what_would_not_be_python_any_more_changes_no_file(tmp_path):
    code_base(tmp_path, first="a = 1\n", other="b = 2\n")
    first, other = read_code_base(tmp_path).sources
    edits = (
        Edit.replace(first, first.tree.body[0], "a = 2"),
        Edit.replace(other, other.tree.body[0], "return"),
    )
    changed, by_hand = new_texts([Finding("some", first.place(1), "a", "b", "yes", edits=edits)])
    assert changed == {}
    assert "some is left to you: " in by_hand[0]
    assert "other.py would not be Python any more ('return' outside function" in by_hand[0]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (WRAPPED, f"x = {WRAPPED[15:-1]},\n            # all\n        )", "comment in it"),
        ("import torch\n", "import torch\n\ndef LoRAStrategy(): pass\n", "a name of its own"),
    ],
)
def test_nothing_is_lost_or_overwritten(tmp_path, old, new, reason):
    script = SCRIPT.partition("import Classifier\n")[2] if "LoRAStrategy" in new else ""
    code_base(tmp_path, model=replaced(old, new) + script, train="" if script else SCRIPT)
    _, (changed, by_hand) = wrapping(tmp_path)
    assert changed == {}
    assert reason in by_hand[0]


def test_a_plugin_with_a_dtype_is_left_to_a_person(tmp_path):
    plugin = "plugins=BitsandbytesPrecision('nf4', dtype=torch.float16)"
    code_base(tmp_path, model=MODULE, train=SCRIPT.replace('strategy="ddp"', plugin))
    one, (changed, _) = wrapping(tmp_path)
    assert "has plugins of its own" in one.becomes
    assert changed == {}


def test_git_has_to_know_the_files_themselves(tmp_path, monkeypatch, capsys):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "scratch").mkdir(parents=True)
    outside.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    git(root, "init", "-q")
    (root / ".gitignore").write_text("scratch/\n", "utf-8")
    code_base(root / "scratch", model=MODULE)
    code_base(outside, train=SCRIPT)
    os.symlink(outside / "train.py", root / "train.py")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "start")
    assert main(["migrate", str(root), "--write", "--yes"]) == 2
    said = capsys.readouterr().err
    assert str(root / "scratch" / "model.py") in said
    assert str(root / "train.py") in said
    assert (root / "scratch" / "model.py").read_text("utf-8") == MODULE
    assert (outside / "train.py").read_text("utf-8") == SCRIPT


def test_the_arguments_are_in_the_report(tmp_path):
    code_base(tmp_path, model=MODULE, train=SCRIPT)
    assert f"LoRAStrategy({LORA})" in wrapping(tmp_path)[0].becomes
