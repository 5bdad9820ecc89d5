"""Loss curves on one axis: optimizer steps, or minutes since the run began."""

from __future__ import annotations

from gradio_app.runs.curves import downsample, finite_points
from gradio_app.runs.files import read_rows
from gradio_app.runs.metrics import Metrics

LOSSES = ("train_loss", "val_loss")
AXES = ("step", "minutes")
# Times are read with the rows, of a very long run those of its end only.
_MOST_BYTES = 20_000_000


def loss_curve(metrics: Metrics, loss: str, axis: str) -> list[tuple[float, float]]:
    """Returns the points of a curve, few enough to be drawn.

    In minutes a pause of the run counts too, and points whose time is not known are left out.
    """
    points = downsample(finite_points(metrics.curve(loss)))
    if axis == "step":
        return [(float(step), value) for step, value in points]
    times = _times(metrics)
    begin = min(times.values(), default=0.0)
    return [((times[step] - begin) / 60, value) for step, value in points if step in times]


def _times(metrics: Metrics) -> dict[int, float]:
    found: dict[int, float] = {}
    for row in read_rows(metrics.file, _MOST_BYTES):
        step, moment = row.get("step"), row.get("time")
        if isinstance(step, int) and isinstance(moment, (int, float)):
            found[step] = float(moment)
    return found
