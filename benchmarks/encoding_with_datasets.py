"""Preparing chat rows by this package, by ``datasets.Dataset.map``, and by TRL.

``python benchmarks/encoding_with_datasets.py [--rows N] [--repeats N] [--quick] [--other FOLDER]``
writes made-up conversations and prepares them in fresh processes, the ways in turn, in one process
and in two. ``ours`` is the preparation of :class:`SupervisedData`, which also finds duplicates,
draws splits and records the rows' origin; ``other`` is the same of another checkout of this
package. ``datasets`` reads the file by ``load_dataset`` and encodes by ``map`` with the same parser
and encoder. ``trl`` reads it the same way and gives it to what ``SFTTrainer`` tokenizes its rows
with, for the loss of answers only. All render the same template, which marks the answers, and write
Arrow; times start after the imports and the tokenizer. The seconds of all processes on a core are
given too, since they depend less on other load. Medians and ratios are in the record
``benchmarks/records/encoding_with_datasets.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from data_path import write_rows
from record import Way, conditions, interleaved, ratio, spread, summary, with_empty_cache, write

MAX_LENGTH = 256
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Assistant:\\n' }}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ '### User:\\n' + message['content'] | trim + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def encode_ours(data: Any, processes: int, cache: Path) -> Any:
    """Prepares ``data`` as training does, and returns its rows."""
    from datasets import concatenate_datasets

    from lightning_peft.data.supervised import SupervisedRows

    SupervisedRows.parallelizable = processes > 1
    return concatenate_datasets(list(data.read().splits.values()))


def encode_with_datasets(data: Any, processes: int, cache: Path) -> Any:
    """Encodes the same rows by ``Dataset.map``, and returns them."""
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

    return rows.map(
        encode,
        num_proc=processes if processes > 1 else None,
        features=encoder.features,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )


def encode_with_trl(data: Any, processes: int, cache: Path) -> Any:
    """Tokenizes the same rows as TRL does before it trains, and returns them."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    trainer: Any = SimpleNamespace(
        _tokenizer=data.tokenizer, chat_template=TEMPLATE, completion_only_loss=False
    )
    config = SFTConfig(
        str(cache),
        dataset_num_proc=processes if processes > 1 else None,
        assistant_only_loss=True,
        max_length=MAX_LENGTH,
        use_cpu=True,
        bf16=False,
    )
    file = data.hparams["data"]
    rows = datasets.load_dataset("json", data_files=file, cache_dir=str(cache), split="train")
    return SFTTrainer._prepare_dataset(trainer, rows, data.tokenizer, config, False, None, "train")


ENCODE = {
    "ours": encode_ours,
    "other": encode_ours,
    "datasets": encode_with_datasets,
    "trl": encode_with_trl,
}


def data_of(who: str, file: Path, cache: Path) -> Any:
    """Returns the data in a file, when all is imported by which ``who`` prepares them."""
    import datasets

    if who == "trl":
        import trl.trainer.sft_trainer  # noqa: F401

    from lightning_peft import SupervisedData
    from lightning_peft.demo.run import BASE

    datasets.disable_progress_bars()
    data = SupervisedData(
        str(file),
        str(BASE),
        chat_template=TEMPLATE,
        max_length=MAX_LENGTH,
        cache_dir=str(cache / "ours"),
    )
    assert data.tokenizer
    return data


def encode(who: str, processes: int, file: Path, cache: Path) -> None:
    """Encodes in this process, and prints the seconds."""
    data = data_of(who, file, cache)
    before, started = os.times(), time.perf_counter()
    rows = ENCODE[who](data, processes, cache)
    seconds, after = time.perf_counter() - started, os.times()
    trained = sum(sum(label != -100 for label in labels) for labels in rows["labels"])
    content = {
        "seconds": seconds,
        "core_seconds": sum(after[:4]) - sum(before[:4]),
        "rows": len(rows),
        "trained_tokens": trained,
    }
    print(json.dumps(content))


def encoded(way: str, file: Path, caches: Path, other: Path | None) -> Way:
    """Returns a function that encodes in a fresh process, with an empty cache."""
    who, processes = way.split()
    environment = {"PYTHONPATH": str(other)} if who == "other" else {}
    words = ("--way", who, "--processes", processes, "--file", str(file))
    return with_empty_cache(__file__, caches, *words, **environment)


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--other", type=Path, help="another checkout of this package")
    parser.add_argument("--way", choices=ENCODE, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        encode(given.way, given.processes, given.file, given.cache)
        return
    where, count = conditions(), 2_000 if given.quick else given.rows
    absent = {"other": given.other is None, "trl": find_spec("trl") is None}
    names = [who for who in ENCODE if not absent.get(who)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "rows.jsonl", count)
        ways = {
            f"{who} {number}": encoded(
                f"{who} {number}", folder / "rows.jsonl", folder, given.other
            )
            for who in names
            for number in (1, 2)
        }
        runs = interleaved(ways, 1 if given.quick else given.repeats)
    assert all(run["rows"] == count for ones in runs.values() for run in ones)
    assert len({run["trained_tokens"] for ones in runs.values() for run in ones}) == 1
    ratios = {
        f"{'one process' if number == 1 else 'two processes'}, {measure}: ours / {who}": ratio(
            runs, f"ours {number}", f"{who} {number}", measure
        )
        for measure in ("seconds", "core_seconds")
        for number in (1, 2)
        for who in names[1:]
    }
    for number in (1, 2):
        speeds = [count / run["seconds"] for run in runs[f"ours {number}"]]
        ratios[f"rows a second, ours, processes: {number}"] = spread(speeds)
    content = {
        "conditions": where,
        "rows": count,
        "measured": summary(runs),
        "ratios": ratios,
        "runs": runs,
    }
    write("encoding_with_datasets", content, quick=given.quick)


if __name__ == "__main__":
    main()
