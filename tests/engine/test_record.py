"""The record stays with the module and is not part of its state."""

from __future__ import annotations

import pytest
from models import stack
from torch import nn

import lightning_peft
from lightning_peft import engine
from lightning_peft.engine.fingerprint import Fingerprint
from lightning_peft.engine.record import AdaptedModuleRecord, AdapterInfo, Record
from lightning_peft.errors import LifecycleError


def test_a_record_comes_and_goes() -> None:
    module, record = nn.Linear(2, 2), Record()
    assert engine.record_of(module) is None
    engine.set_record(module, record)
    assert engine.record_of(module) is record
    assert engine.require_record(module) is record
    assert list(module.state_dict()) == ["weight", "bias"]
    assert not list(module.children())
    engine.set_record(module, None)
    engine.set_record(module, None)


CALLS = {
    "require_record": engine.require_record,
    "merge": lightning_peft.merge,
    "unmerge": lightning_peft.unmerge,
    "unload": lightning_peft.unload,
    "report": lightning_peft.report,
    "verify": lambda module: lightning_peft.verify(module, None),
    "disable_adapters": lambda module: lightning_peft.disable_adapters(module).__enter__(),
    "set_adapter": lambda module: lightning_peft.set_adapter(module, "default"),
    "save_adapter": lambda module: lightning_peft.save_adapter(module, "nowhere"),
    "trainable_state_dict": engine.trainable_state_dict,
    "describe": engine.describe,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_module_without_adapters_is_refused(name: str) -> None:
    with pytest.raises(LifecycleError, match=r"Linear has no adapters yet. Call lightning_peft"):
        CALLS[name](nn.Linear(2, 2))


def test_a_part_or_a_holder_of_a_module_with_adapters_is_refused(tmp_path) -> None:
    outer = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))
    lightning_peft.inject(outer[0], target_modules=["0.0"])
    for module in (outer, outer[0][0]):
        with pytest.raises(LifecycleError, match="were added to another module"):
            lightning_peft.save_adapter(module, tmp_path / "nowhere")
    lightning_peft.save_adapter(outer[0], tmp_path / "there")


def test_names_are_relative_to_the_module() -> None:
    base = Fingerprint({})
    assert AdaptedModuleRecord("", base, {}).qualified("a.b") == "a.b"
    assert AdaptedModuleRecord("part", base, {}).qualified("a.b") == "part.a.b"


def test_what_all_parts_have_together() -> None:
    base, info = Fingerprint({}), AdapterInfo({}, [], True)
    record = Record(
        {
            "x": AdaptedModuleRecord(
                "x", base, {}, frozen={"x.w"}, adapters={"b": info, "a": info}
            ),
            "y": AdaptedModuleRecord(
                "y", base, {}, frozen={"y.w"}, adapters={"a": info, "c": info}
            ),
        }
    )
    assert record.frozen == {"x.w", "y.w"}
    assert record.adapter_names == ["b", "a", "c"]
    assert Record().frozen == set()


def test_injection_fills_it() -> None:
    module = nn.ModuleDict({"model": stack()})
    lightning_peft.inject(module, r=2, adapt="model", target_modules=["first"])
    record = engine.require_record(module)
    entry = record.parts["model"]
    assert record.active == ("default",)
    assert entry.adapters["default"].targets == ["first"]
    assert entry.adapters["default"].in_place
    assert entry.heads == ["head"]
    assert entry.base_id == {
        "name_or_path": None,
        "revision": None,
        "class": "Stack",
        "dtype": "float32",
        "vocabulary": None,
    }
    assert entry.base.names == ("first.weight", "first.bias", "second.weight", "second.bias")
    assert entry.base.shapes == ((64, 96), (64,), (96, 64), (96,))
    assert entry.frozen == {f"model.{name}" for name in entry.base.names}
