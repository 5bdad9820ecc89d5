"""Faults in installed packages, as metadata on a path of its own."""

import pytest

from lightning_peft.doctor.packages import (
    check_compatibility,
    check_compromised,
    check_python,
    check_requirements,
)

GOOD = {"lightning_peft": ("1.0", ["peft>=0.19", 'lightning>=2.6; extra == "lightning"'])}
GOOD |= {"peft": ("0.20", []), "lightning": ("2.6.6", []), "pytorch_lightning": ("2.6.6", [])}


@pytest.fixture
def installed(tmp_path):
    """Writes metadata: package -> version and requirements."""

    def write(**packages):
        for name, (version, requires) in packages.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            lines += [f"Requires-Dist: {one}" for one in requires]
            (folder / "METADATA").write_text("\n".join(lines) + "\n")
        return [str(tmp_path)]

    return write


def test_a_good_environment_is_fine(installed):
    path = installed(**GOOD)
    for check in (check_compromised, check_requirements, check_compatibility):
        found = check(path)
        assert (found.status, found.remedy) == ("ok", ""), found
    assert "peft 0.20" in check_requirements(path).detail
    assert "lightning 2.6.6" in check_requirements(path).detail
    assert check_python().status == "ok"


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
@pytest.mark.parametrize("name", ["lightning", "pytorch_lightning"])
def test_a_compromised_release_is_found(installed, name, version):
    found = check_compromised(installed(**{**GOOD, name: (version, [])}))
    assert found.status == "failed"
    spelled = name.replace("_", "-")
    assert f"{spelled} {version}" in found.detail
    assert f"pip uninstall {spelled}`" in found.remedy
    assert "rotate every credential" in found.remedy


def test_a_compromised_release_is_found_behind_a_good_one(installed):
    path = installed(**GOOD)
    installed(lightning=("2.6.3", []))
    found = check_compromised(path)
    assert found.status == "failed"
    assert "lightning 2.6.3" in found.detail


def test_two_versions_of_lightning_are_said_and_fine(installed):
    same = check_compromised(installed(**GOOD))
    assert "side by side" not in same.detail
    other = check_compromised(installed(pytorch_lightning=("2.6.5", [])))
    assert other.status == "ok"
    assert "different versions side by side are fine" in other.detail


@pytest.mark.parametrize(
    ("change", "detail", "remedy"),
    [
        ({"peft": ("0.18", [])}, "peft 0.18 is installed, >=0.19 is required", '"peft>=0.19"'),
        ({"peft": ("main", [])}, "peft main is installed", '"peft>=0.19"'),
        ({"lightning": ("2.5", [])}, "lightning 2.5 is installed", '"lightning>=2.6"'),
    ],
)
def test_a_version_out_of_range_is_found(installed, change, detail, remedy):
    found = check_requirements(installed(**{**GOOD, **change}))
    assert found.status == "failed"
    assert detail in found.detail
    assert found.remedy == f"Run `pip install {remedy}`."


def test_an_optional_package_is_not_missed(installed):
    some = {name: GOOD[name] for name in ("lightning_peft", "peft")}
    assert check_requirements(installed(**some)).status == "ok"
    assert check_compromised(installed()).detail.startswith("neither")


def test_a_required_package_that_is_not_there_is_found(installed):
    found = check_requirements(installed(lightning_peft=GOOD["lightning_peft"]))
    assert (found.status, found.detail) == ("failed", "peft is not installed")


def test_remains_of_an_installation_are_not_taken_for_it(installed, tmp_path):
    path = installed(**GOOD)
    (tmp_path / "peft-0.1.dist-info").mkdir()
    # As pip leaves it where a file was in use.
    left = tmp_path / "~eft-0.2.dist-info"
    left.mkdir()
    (left / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.2\n")
    found = check_requirements(path)
    assert found.status == "ok"
    assert "peft 0.20," in found.detail


def test_no_metadata_at_all_is_said(installed):
    found = check_requirements(installed(peft=GOOD["peft"]))
    assert found.status == "warning"
    assert "pip install lightning-peft" in found.remedy


@pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
def test_a_package_for_another_torch_is_found(installed, name):
    path = installed(torch=("2.6.0+cu124", []), accelerate=("1.0", ["torch==2.6.0"]))
    # A local label such as +cu124 does not make another version of it.
    assert check_compatibility(path).status == "ok"
    installed(**{name: ("0.22.0", ["torch==2.7.0"])})
    found = check_compatibility(path)
    assert found.status == "warning"
    assert found.detail == (
        f"{name} 0.22.0 requires torch==2.7.0: torch 2.6.0+cu124 is installed, ==2.7.0 is required"
    )
    assert f"pip install --upgrade {name}`" in found.remedy
