"""datasets: row-wise Arrow writer and progress bars."""

from __future__ import annotations

# Public alternative: `Dataset.from_generator`, which holds no writer open for several splits.
from datasets.arrow_writer import ArrowWriter as ArrowWriter

# Public alternative: none. `datasets.disable_progress_bars` switches these off.
from datasets.utils import tqdm as tqdm
