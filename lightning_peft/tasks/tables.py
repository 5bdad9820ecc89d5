"""Tables in Lightning loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as _Callback
    from pytorch_lightning.callbacks import EarlyStopping as _EarlyStopping
    from pytorch_lightning.callbacks import ModelCheckpoint as _ModelCheckpoint
else:
    _Callback = _EarlyStopping = _ModelCheckpoint = object


def log_table(
    logger: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Logs a table to Weights & Biases, MLflow or TensorBoard; other loggers are left alone.

    To be called by the first process only, as ``trainer.is_global_zero`` specifies.

    Args:
        logger: One of ``trainer.loggers``: a ``WandbLogger``, which makes a table of it; an
            ``MLFlowLogger``, which adds rows with their step to the artifact ``NAME.json``; a
            ``TensorBoardLogger``, which shows it as text. Known by the methods that it has.
        name: What it is called there.
        columns: Names of the columns.
        rows: A value for each column; texts, numbers or ``None``. Weights & Biases refuses texts
            and numbers in one column.
        step: Optimizer steps so far.
    """
    if hasattr(logger, "log_table"):
        logger.log_table(name, columns=[*columns], data=[[*row] for row in rows], step=step)
    elif hasattr(logger, "run_id") and hasattr(logger.experiment, "log_table"):
        values = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
        table = {"step": [step] * len(rows), **values}
        logger.experiment.log_table(logger.run_id, table, f"{name}.json")
    elif hasattr(logger.experiment, "add_text"):
        lines = [columns, ["---"] * len(columns), *rows]
        logger.experiment.add_text(name, "\n".join(map(_markdown, lines)), step)


def _markdown(row: Sequence[Any]) -> str:
    cells = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row)
    return f"| {' | '.join(cells)} |"
