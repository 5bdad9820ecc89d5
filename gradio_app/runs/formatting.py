"""Localized formatting of times, sizes and numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from gradio_app.texts import Texts

Translate = Callable[..., str]
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400


def format_duration(seconds: float, t: Translate) -> str:
    """Returns a length of time in one unit, or two where one would be too rough."""
    whole = max(0, round(seconds))
    if whole < _MINUTE:
        return t("run.seconds", n=whole)
    if whole < _HOUR:
        return t("run.minutes", n=round(whole / _MINUTE))
    if whole < _DAY:
        return t("run.hours", n=whole // _HOUR, more=whole % _HOUR // _MINUTE)
    return t("run.days", n=whole // _DAY, more=whole % _DAY // _HOUR)


def time_ago(moment: float, t: Translate, now: float | None = None) -> str:
    """Returns how long ago something was."""
    passed = (time.time() if now is None else now) - moment
    return t("run.just_now") if passed < 45 else t("run.ago", time=format_duration(passed, t))


def format_bytes(count: float, t: Texts) -> str:
    """Returns a number of bytes, in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1_000
    return t.localized(f"{count:,.1f} GB")


def format_number(value: float, t: Texts) -> str:
    """Returns a value of a metric with as many digits as are worth reading."""
    if value and abs(value) < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        return t.localized(f"{digits}e{int(power)}")
    return t.localized(f"{value:.4g}")


def format_metric(found: float, t: Texts) -> str:
    """Returns a value of a metric, or that it is not a number any more."""
    return format_number(found, t) if math.isfinite(found) else t("run.no_number")


def metric(name: str, t: Texts) -> str:
    """Returns the label of a validation metric: the task's own name if no other."""
    if name == "val_loss":
        return t("run.val_loss")
    key = name.removeprefix("val_")
    known = f"run.metric_{key}"
    return t(known) if t.has(known) else key.replace("_", " ").capitalize()


def format_count(value: float, t: Texts) -> str:
    """Returns a count or a rate, short: ``2.1k``."""
    if abs(value) >= 999_500:
        return t.localized(f"{value / 1e6:.1f}M")
    if abs(value) >= 1_000:
        return t.localized(f"{value / 1e3:.1f}k")
    return f"{value:.0f}" if abs(value) >= 10 else t.localized(f"{value:.1f}")
