"""Tasks that tests write, with rows of the demo's examples, and the harness' own command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finished import EXAMPLES
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

QUESTION = "### Question:\\n{{prompt}}\\n\\n### Answer:"
_START = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {name}_train.jsonl, test: {name}_test.jsonl}}}}
output_type: {kind}
test_split: test
fewshot_split: train
doc_to_text: "{question}"
target_delimiter: "\\n"
metadata: {{version: 2.0}}
"""
_CHOICE = """\
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
_ANSWER = """\
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
KINDS = {"multiple_choice": _CHOICE, "generate_until": _ANSWER}


def write_task(folder: Path, name: str, kind: str, rows: int = 12) -> None:
    """Writes a task in which an answer of the demo's is to be found among three, or generated."""
    lines = [json.loads(line) for line in EXAMPLES.read_text().splitlines()[:400]]
    short = [line for line in lines if len(line["response"]) < 90]
    made = []
    for place, line in enumerate(short[: rows + 2]):
        others = [short[(place * 7 + step) % len(short)]["response"] for step in (16, 27)]
        gold = place % 3
        choices = [*others[:gold], line["response"], *others[gold:]]
        made.append({"prompt": line["prompt"], "choices": choices, "gold": gold})
    folder.mkdir(parents=True, exist_ok=True)
    text = _START.format(name=name, kind=kind, question=QUESTION) + KINDS[kind]
    (folder / f"{name}.yaml").write_text(text)
    for split, part in (("train", made[:2]), ("test", made[2:])):
        (folder / f"{name}_{split}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")


def by_harness(model: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """Returns the harness' own results of a model folder on tasks in the working directory."""
    lm = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    manager = TaskManager(include_path=".", include_defaults=False)
    return simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)
