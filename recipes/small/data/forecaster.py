"""Writes forecaster.safetensors again: a small forecaster, trained in full on temperatures.

    python forecaster.py    (about a minute on a CPU; the same versions give the same weights)

seattle.csv holds the highest and the lowest temperature (degrees Celsius) of every day from 2012
to 2015 in Seattle: measurements of NOAA, in the public domain, as vega-datasets 0.9.0 ships them
(``seattle-weather.csv``; dates with dashes, other columns left out). The forecaster sees the first
70 % of the days.

The recipe adapts it to el_nino.csv, the monthly temperature of the sea surface (degrees Celsius)
off Ecuador and Peru, from 1950 to 2010: NOAA's ERSST.V3B, region Nino 1+2, in the public domain, as
statsmodels ships it (``elnino.csv``; one row for each month).
"""

from __future__ import annotations

from pathlib import Path

import torch
from pytorch_lightning import Trainer, seed_everything
from safetensors.torch import save_file

from lightning_peft.data.series import SeriesData
from lightning_peft.tasks.time_series import Forecaster

HERE = Path(__file__).parent


def main() -> None:
    """Writes the file next to this one."""
    seed_everything(0)
    torch.set_num_threads(1)
    data = SeriesData(str(HERE / "seattle.csv"), time="date")
    net = Forecaster(learning_rate=1e-3)
    trainer = Trainer(accelerator="cpu", max_epochs=20, logger=False, enable_checkpointing=False)
    trainer.fit(net, data)
    own = set(data.statistics().__dict__)
    weights = {name: value for name, value in net.state_dict().items() if name not in own}
    file = HERE / "forecaster.safetensors"
    save_file(weights, file, metadata={"series": ", ".join(data.columns), "seed": "0"})
    scores = trainer.validate(net, data)[0]
    print(f"{file.name}: {file.stat().st_size:,} bytes; {scores}")


if __name__ == "__main__":
    main()
