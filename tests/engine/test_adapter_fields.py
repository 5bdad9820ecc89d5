"""Fields of ``adapter_config.json`` are used, or named, or refused in words."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    get_peft_model,
)
from torch import Tensor, nn

import lightning_peft
from lightning_peft.engine.files.adapter_fields import checked_fields
from lightning_peft.errors import CheckpointError, LightningPeftError, UnsupportedError

from .reference import assert_same, randomize, refused, snapshot


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    module = net()
    lightning_peft.inject(module, r=2, target_modules=["0"])
    randomize(module)
    return lightning_peft.save_adapter(module, path)


def changed(folder: Path, path: Path, without: tuple[str, ...] = (), **fields: Any) -> Path:
    """Returns a copy of ``folder`` with other fields, as another program would write it."""
    path.mkdir(exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {k: v for k, v in config.items() if k not in without} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    weights = "adapter_model.safetensors"
    (path / weights).write_bytes((folder / weights).read_bytes())
    return path


def output(path: Path, **options: Any) -> Tensor:
    module = net()
    lightning_peft.load_adapter(module, path, **options)
    return module(torch.linspace(-1, 1, 12).reshape(3, 4))


# --- fields that the installed PEFT does not know -------------------------------------------------


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_off_changes_nothing(
    value: Any, folder: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(output(changed(folder, tmp_path, later=value)), output(folder))


@pytest.mark.parametrize("value", [0, 2.5, "fast"])
def test_an_unknown_setting_is_named_with_its_value(
    value: Any, folder: Path, tmp_path: Path
) -> None:
    path = changed(folder, tmp_path, later_rate=value, peft_version="77.1.0")
    with pytest.warns(UserWarning, match=rf"later_rate={value!r}(.|\n)*written by PEFT 77.1.0"):
        assert torch.equal(output(path), output(folder))


@pytest.mark.parametrize("value", [True, ["x"], {"level": 1}])
def test_an_unknown_switch_is_refused_and_can_be_allowed(
    value: Any, folder: Path, tmp_path: Path
) -> None:
    path = changed(folder, tmp_path, use_later=value, rate=3)
    with pytest.raises(CheckpointError, match=r"use_later=(.|\n)*allow_unknown_fields=True"):
        output(path)
    with pytest.warns(UserWarning, match=r"use_later=(.|\n)*rate=3"):
        assert torch.equal(output(path, allow_unknown_fields=True), output(folder))


def test_an_unknown_key_of_a_nested_config_is_named(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path, eva_config={"rho": 2.0, "later": 4})
    with pytest.warns(UserWarning, match=r"eva_config\.later=4"):
        output(path)


def test_notes_for_loaders_by_name_are_not_settings(folder: Path, tmp_path: Path) -> None:
    mapping = {"base_model_class": "Net", "parent_library": "nets", "note": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(changed(folder, tmp_path, auto_mapping=mapping))


# --- values of the wrong kind ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "8"}, "r='8': a number is meant"),
        ({"r": None}, "r=None: a number is meant"),
        ({"r": True}, "r=True: a number is meant"),
        ({"use_dora": "false"}, "use_dora='false': true or false is meant"),
        ({"use_rslora": 1}, "use_rslora=1: true or false is meant"),
        ({"target_modules": 5}, "target_modules=5: a list or a text or null is meant"),
        ({"target_modules": [5]}, r"target_modules=\[5\]"),
        ({"modules_to_save": "head"}, "modules_to_save='head'"),
        ({"rank_pattern": ["0"]}, "rank_pattern="),
        ({"lora_alpha": [1]}, "lora_alpha="),
        ({"bias": 0}, "bias=0: a text is meant"),
        ({"init_lora_weights": 3}, "init_lora_weights=3: true or false or a text is meant"),
        ({"loftq_config": 3}, "loftq_config=3: a mapping is meant"),
        ({"r": 2.5}, "r=2.5: the rank is a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: a positive number"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"r": 10**9}, "r=1000000000"),
        ({"rank_pattern": {"0": 10**9}}, "r=1000000000"),
        ({"bias": "some"}, "bias='some': one of"),
        ({"task_type": "PAINTING"}, "Invalid task type"),
        ({"peft_type": "LATER"}, "peft_type='LATER' is not a method"),
        ({"peft_type": ["LORA"]}, "is not a method"),
        ({"peft_type": None}, "does not say `peft_type`"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["9"]}, r"does not fit Sequential(.|\n)*'9' of target_modules matches"),
    ],
)
def test_wrong_values_are_named(
    fields: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    module = net()
    with refused(module, CheckpointError, message):
        lightning_peft.load_adapter(module, changed(folder, tmp_path, **fields))


def test_all_wrong_values_come_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"r='8'(.|\n)*use_dora=1"):
        output(changed(folder, tmp_path, r="8", use_dora=1))


def test_null_for_a_mapping_is_an_empty_one(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path, rank_pattern=None, alpha_pattern=None)
    assert torch.equal(output(path), output(folder))


def test_fields_that_are_missing_have_their_defaults(folder: Path, tmp_path: Path) -> None:
    path = changed(
        folder, tmp_path, without=("rank_pattern", "bias", "use_dora", "init_lora_weights")
    )
    assert torch.equal(output(path), output(folder))
    with pytest.raises(CheckpointError, match=r"\(2, 4\) in the file, \(8, 4\) in the module"):
        output(changed(folder, tmp_path, without=("r",)))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["0"]),
        IA3Config(target_modules=["0"], feedforward_modules=[]),
        LoHaConfig(r=2, target_modules=["0"]),
        LoKrConfig(r=2, target_modules=["0"]),
        OFTConfig(oft_block_size=2, target_modules=["0"]),
        HRAConfig(r=2, target_modules=["0"]),
        MissConfig(r=2, target_modules=["0"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_what_peft_writes_has_the_right_kinds(config: PeftConfig, tmp_path: Path) -> None:
    get_peft_model(net(), config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked_fields(written, tmp_path)
        lightning_peft.load_adapter(net(), tmp_path)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[1]", b'"text"', b"null", b"[" * 100_000, b"{}\n{}", b"nan"],
    ids=lambda content: repr(content[:8]),
)
def test_what_is_not_a_json_object(content: bytes, folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path)
    (path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as JSON|holds no JSON object"):
        output(path)


def test_a_byte_order_mark_is_passed_over(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path)
    file = path / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert torch.equal(output(path), output(folder))


def test_weights_in_several_files_are_refused(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path)
    (path / "adapter_model.safetensors").rename(path / "adapter_model-00001-of-00002.safetensors")
    (path / "adapter_model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"in several files(.|\n)*adapter_model-00001-of"):
        output(path)


# --- any field with any value ---------------------------------------------------------------------

_KNOWN = sorted(LoraConfig(target_modules=["0"]).to_dict())
_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["LORA", "pissa", "all", "0", "all-linear", "SEQ_CLS", "olora", "2"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
_FIELDS = st.dictionaries(
    st.one_of(st.sampled_from(_KNOWN), st.text(max_size=12)), _VALUES, min_size=1, max_size=3
)


def check_any_fields(fields: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """A folder with such fields is loaded, with what is not used named, or refused in words."""
    path = changed(folder, tmp_path, **copy.deepcopy(fields))
    module = net()
    before = snapshot(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lightning_peft.load_adapter(module, path)
        except LightningPeftError:
            assert_same(before, snapshot(module))
            return
    said = "".join(str(warning.message) for warning in caught)
    for name, value in fields.items():
        off = value is None or value is False or value in ("", [], {})
        if name not in (*_KNOWN, "runtime_config") and not off:
            assert f"{name}={value!r}" in said
    assert all(p.isfinite().all() for p in module.parameters())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(fields=_FIELDS)
def test_any_fields(fields: dict[str, Any], folder: Path, tmp_path_factory: Any) -> None:
    check_any_fields(fields, folder, tmp_path_factory.getbasetemp() / "fields")


@pytest.mark.long
@settings(
    max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(fields=_FIELDS)
def test_any_fields_often(fields: dict[str, Any], folder: Path, tmp_path_factory: Any) -> None:
    check_any_fields(fields, folder, tmp_path_factory.getbasetemp() / "fields")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"peft_type": "PROMPT_TUNING"}, "virtual tokens"),
    ],
)
def test_what_cannot_be_injected_is_refused(
    fields: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        output(changed(folder, tmp_path, **fields))
