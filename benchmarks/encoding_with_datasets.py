"""Encoding chat rows by this package against ``datasets.Dataset.map`` with the same encoder.

``python benchmarks/encoding_with_datasets.py [--rows N] [--repeats N] [--quick]`` writes made-up
conversations and encodes them in fresh processes, the ways in turn, in one process and in two.
``ours`` is the preparation of :class:`SupervisedData`, which also finds duplicates, draws splits
and records the rows' origin. ``datasets`` reads the file by ``load_dataset`` and encodes by ``map``
with the same parser and encoder. Both read the file and write Arrow; times start after the imports
and the tokenizer. The medians and ratios are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from data_path import write_rows
from record import conditions, interleaved, ratio, run_script, summary

WAYS = {f"{who} {count}": (who, count) for count in (1, 2) for who in ("ours", "datasets")}


def encode_ours(data: Any, processes: int) -> int:
    """Prepares ``data`` as training does, and returns its rows."""
    from lightning_peft.data import parallel_encoding
    from lightning_peft.data.supervised import SupervisedRows

    SupervisedRows.parallelizable = processes > 1
    # This process encodes too.
    parallel_encoding.MAX_WORKERS = processes - 1
    return sum(len(split) for split in data.read().splits.values())


def encode_with_datasets(data: Any, processes: int, cache: Path) -> int:
    """Encodes the same rows by ``Dataset.map``, and returns their number."""
    import datasets

    from lightning_peft.data.parallel_encoding import outcome
    from lightning_peft.data.shapes import detect_layout

    file = data.hparams["data"]
    rows = datasets.load_dataset("json", data_files=file, cache_dir=str(cache), split="train")
    layout = detect_layout(list(islice(rows, 100)), None, "auto", data.accepts)
    encoder = data.encoder_for(layout)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        done = outcome(encoder, layout.parse(row))
        assert not done.problems
        return dict(done.rows[0])

    encoded = rows.map(
        encode,
        num_proc=processes if processes > 1 else None,
        features=encoder.features,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )
    return len(encoded)


def encode(way: str, file: Path, cache: Path) -> None:
    """Encodes in this process, and prints the seconds."""
    import datasets

    from lightning_peft import SupervisedData
    from lightning_peft.demo.run import BASE

    datasets.disable_progress_bars()
    who, processes = WAYS[way]
    data = SupervisedData(
        str(file), str(BASE), chat_template="plain", max_length=256, cache_dir=str(cache / "ours")
    )
    assert data.tokenizer
    started = time.perf_counter()
    if who == "ours":
        rows = encode_ours(data, processes)
    else:
        rows = encode_with_datasets(data, processes, cache)
    print(json.dumps({"seconds": time.perf_counter() - started, "rows": rows}))


def encoded(way: str, file: Path, caches: Path) -> Callable[[], Mapping[str, float]]:
    """Returns a function that encodes in a fresh process, with an empty cache."""

    def run() -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=caches) as cache:
            return run_script(__file__, "--way", way, "--file", str(file), "--cache", cache)

    return run


def main() -> None:
    """Measures, and prints the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        encode(given.way, given.file, given.cache)
        return
    where, count = conditions(), 200 if given.quick else given.rows
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "rows.jsonl", count)
        ways = {way: encoded(way, folder / "rows.jsonl", folder) for way in WAYS}
        runs = interleaved(ways, 1 if given.quick else given.repeats)
    assert all(run["rows"] == count for ones in runs.values() for run in ones)
    ratios = {
        "one process: datasets.map / ours": ratio(runs, "datasets 1", "ours 1", "seconds"),
        "two processes: datasets.map / ours": ratio(runs, "datasets 2", "ours 2", "seconds"),
    }
    content = {"conditions": where, "rows": count, "measured": summary(runs), "ratios": ratios}
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
