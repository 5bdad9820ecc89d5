"""The engine's names load on first use, and all of them exist."""

from __future__ import annotations

from types import ModuleType

import pytest

import lightning_peft
from lightning_peft import engine, tasks


@pytest.mark.parametrize("package", [lightning_peft, engine, tasks], ids=lambda p: p.__name__)
def test_every_exported_name_loads_on_first_use(package: ModuleType) -> None:
    assert package.__all__ == sorted(set(package.__all__))
    for name in package.__all__:
        value = getattr(package, name)
        assert name.isupper() or value.__name__ == name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_a_name_is_the_one_of_its_module() -> None:
    from lightning_peft.engine.injection import inject

    assert engine.inject is inject
    assert lightning_peft.inject is inject
    assert vars(engine)["inject"] is inject
