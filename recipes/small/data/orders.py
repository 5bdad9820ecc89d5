"""Writes ``orders.jsonl`` next to this file: the order e-mails of `lightning-peft demo`."""

from pathlib import Path

from lightning_peft.demo.orders import order_splits, written_rows

TRAIN, VALIDATION = 192, 16


def main() -> None:
    """Writes the same file each time."""
    file = Path(__file__).with_suffix(".jsonl")
    file.write_text(written_rows(order_splits(TRAIN, VALIDATION)), encoding="utf-8")


if __name__ == "__main__":
    main()
