"""The names of classes: agreed between data, model and checkpoint, in one order."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


def label_configuration(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of a transformers configuration that name the classes.

    Args:
        labels: Names in the order of the model's outputs.
    """
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: place for place, label in enumerate(labels)},
        # transformers would take one number per row for a regression, and guess from the dtype.
        "problem_type": "single_label_classification",
    }


def agreed_labels(
    own: Sequence[str] | None, given: Sequence[str] | None, task: str, data: str
) -> list[str]:
    """Returns the labels that a task and its data agree on.

    Args:
        own: Labels of the task, if it knows them.
        given: Labels of the data, if it has them.
        task: Name of the task's class.
        data: Name of the class of its data.

    Raises:
        ConfigError: If nobody names labels, or the two differ, be it in order alone.
    """
    if own is None and given is None:
        raise ConfigError(
            f"{task} does not know its labels: {data} has no `labels`, and none are given. Name "
            "them in the order of the model's outputs with labels=[...]."
        )
    if own is not None and given is not None and list(own) != list(given):
        raise ConfigError(
            f"{task} has the labels {_difference(own, given, data)}. Name the same ones in the "
            "same order in both, or leave labels= out of the task."
        )
    return list(own if own is not None else given or [])


def check_labels_of(checkpoint: dict[str, Any], own: Sequence[str]) -> None:
    """Refuses a checkpoint of other labels, whose head would be read as if they were these.

    Raises:
        CheckpointError: If the labels differ, be it in order alone.
    """
    trained = checkpoint.get("hyper_parameters", {}).get("labels")
    if trained is not None and list(trained) != list(own):
        raise CheckpointError(
            f"The checkpoint was trained with the labels {_difference(trained, own, 'this run')}. "
            "Give labels=[...] in the order of the checkpoint, or train anew."
        )


def check_labels_of_model(pretrained: Mapping[int, str], own: Sequence[str], model: str) -> None:
    """Refuses a model whose head says the same labels in another order.

    A head for as many other labels is kept as the start of training, which is told.

    Args:
        pretrained: ``id2label`` of the configuration that the model comes with.
        own: Labels of this run.
        model: Name of the model.

    Raises:
        ConfigError: If only the order differs.
    """
    names = [str(pretrained[place]) for place in sorted(pretrained)]
    unnamed = [f"LABEL_{place}" for place in range(len(names))]
    if names in (list(own), unnamed) or len(names) != len(own):
        return
    if sorted(names) == sorted(own):
        raise ConfigError(
            f"{model!r} was trained with the labels {_difference(names, own, 'the data')}. Its "
            "head would be read the wrong way round: give labels=[...] to the data in the order "
            "of the model."
        )
    log.warning(
        f"The head of {model!r} is for {_listed(names)}. It has as many outputs as there are "
        f"labels here, so its weights are kept as the start of training for {_listed(own)}; until "
        "then its answers mean nothing."
    )


def _difference(one: Sequence[str], other: Sequence[str], owner: str) -> str:
    same = "the same in another order" if sorted(one) == sorted(other) else "others"
    return f"{_listed(one)}, and {owner} has {same}: {_listed(other)}"


def _listed(labels: Sequence[str], limit: int = 20) -> str:
    rest = len(labels) - limit
    return ", ".join(labels[:limit]) + (f" and {rest} more" if rest > 0 else "")
