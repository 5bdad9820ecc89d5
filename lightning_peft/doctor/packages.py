"""Installed packages from their metadata, without importing them."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from lightning_peft.doctor.results import CheckResult

OURS = "lightning-peft"
LIGHTNING = ("lightning", "pytorch-lightning")
# Withdrawn from PyPI after a supply-chain compromise.
COMPROMISED = ("2.6.2", "2.6.3")
# The packages whose own requirements are compared: those that break each other in practice.
_RELATED = ("torchvision", "torchaudio", "torchmetrics", "accelerate", "huggingface-hub")


def installed_versions(name: str, path: list[str] | None = None) -> list[str]:
    """Returns every version of a package, what is imported first.

    More than one is there where an installation was interrupted, or folders shadow each other.
    """
    places = _distributions(name, path)
    # A folder without a METADATA file has no version.
    return list(dict.fromkeys(place.version for place in places if place.metadata["Version"]))


def _distributions(name: str, path: list[str] | None) -> Iterable[Distribution]:
    return distributions(name=name) if path is None else distributions(name=name, path=path)


def required(name: str = OURS, extra: str = "", path: list[str] | None = None) -> list[Requirement]:
    """Returns the requirements of a package here, with one of its extras."""
    first = next(iter(_distributions(name, path)), None)
    if first is None:
        raise PackageNotFoundError(name)
    every = [Requirement(line) for line in first.requires or []]
    return [
        requirement
        for requirement in every
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    ]


def check_python() -> CheckResult:
    """Compares the running Python with what this package requires."""
    version = platform.python_version()
    allowed = distribution(OURS).metadata["Requires-Python"] or ""
    detail = f"{platform.python_implementation()} {version} on {platform.platform()}"
    # A build of its own may call itself 3.12.1+, which is not a version of a package.
    if SpecifierSet(allowed).contains(version.rstrip("+"), prereleases=True):
        return CheckResult("ok", detail)
    remedy = f"Make an environment with a Python {allowed}."
    return CheckResult("failed", f"{detail}; {allowed} is required", remedy)


def check_compromised(path: list[str] | None = None) -> CheckResult:
    """Looks for the releases of Lightning that steal credentials."""
    installed = {name: there for name in LIGHTNING if (there := installed_versions(name, path))}
    bad = [
        f"{name} {version}"
        for name, all_ in installed.items()
        for version in all_
        if version in COMPROMISED
    ]
    if bad:
        names = " ".join(dict.fromkeys(version.partition(" ")[0] for version in bad))
        return CheckResult(
            "failed",
            f"{', '.join(bad)}: withdrawn after a supply-chain compromise",
            f"Do not import it. Run `pip uninstall {names}`, rotate every credential that this "
            "machine could read (tokens, keys, passwords), and install a release that is neither "
            f"{' nor '.join(COMPROMISED)}.",
        )
    shown = ", ".join(f"{name} {' and '.join(all_)}" for name, all_ in installed.items())
    detail = shown or "neither lightning nor pytorch-lightning"
    if len(installed) == 2 and len({tuple(all_) for all_ in installed.values()}) == 2:
        detail += "; different versions side by side are fine: each Trainer gets classes of its own"
    return CheckResult("ok", detail)


def check_requirements(path: list[str] | None = None) -> CheckResult:
    """Compares what is installed with the ranges that this package declares."""
    try:
        requirements = required(path=path)
    except PackageNotFoundError:
        remedy = f"Install it: pip install {OURS}"
        return CheckResult("warning", f"{OURS} has no metadata: not installed", remedy)
    known = {canonicalize_name(requirement.name) for requirement in requirements}
    requirements += [
        requirement
        for requirement in required(extra="lightning", path=path)
        if canonicalize_name(requirement.name) not in known
        and installed_versions(requirement.name, path)
    ]
    problems = {
        str(requirement): problem
        for requirement in requirements
        if (problem := _unmet(requirement, path))
    }
    if problems:
        command = " ".join(
            f'"{_plain(requirement)}"'
            for requirement in requirements
            if str(requirement) in problems
        )
        detail = "; ".join(problems.values())
        return CheckResult("failed", detail, f"Run `pip install {command}`.")
    shown = [
        canonicalize_name(requirement.name) for requirement in requirements if requirement.specifier
    ]
    detail = ", ".join(f"{name} {installed_versions(name, path)[0]}" for name in shown)
    return CheckResult("ok", detail)


def check_compatibility(path: list[str] | None = None) -> CheckResult:
    """Compares packages with what each requires of the others, torchvision of torch first."""
    names = [*_RELATED, *LIGHTNING, "transformers", "peft", "bitsandbytes"]
    present = {name: there[0] for name in names if (there := installed_versions(name, path))}
    problems = [
        f"{name} {version} requires {_plain(requirement)}: {problem}"
        for name, version in present.items()
        for requirement in required(name, path=path)
        if (problem := _unmet(requirement, path))
    ]
    if problems:
        remedy = (
            "Install releases that belong together in one command, such as "
            f"`pip install --upgrade {' '.join(_named(problems))}`; packages of torch come from "
            "the same index as torch."
        )
        return CheckResult("warning", "; ".join(problems), remedy)
    return CheckResult("ok", f"{', '.join(present)} get what they require")


def _named(problems: list[str]) -> list[str]:
    return list(dict.fromkeys(problem.partition(" ")[0] for problem in problems))


def _plain(requirement: Requirement) -> str:
    """Returns a requirement as pip takes it, without its marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _unmet(requirement: Requirement, path: list[str] | None) -> str | None:
    """Returns the problem of an installed requirement, or None."""
    name = canonicalize_name(requirement.name)
    versions = installed_versions(name, path)
    if not versions:
        return f"{name} is not installed"
    version = versions[0]
    try:
        fits = requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    return None if fits else f"{name} {version} is installed, {requirement.specifier} is required"
