"""chemprop's message passing networks train unedited."""

from __future__ import annotations

from pathlib import Path

import pytest
from kinds.kind import names

from .published import Published, check_page, parametrized, published, train

pytest.importorskip("chemprop", reason="needs the extra `published`")

from chemprop import data, models, nn

SMILES = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCOC", "CCCl", "CC#N", "OCCO"]


def loaders():
    points = [data.MoleculeDatapoint.from_smi(s, [float(len(s) % 2)]) for s in SMILES]
    made = data.MoleculeDataset(points)
    return tuple(
        data.build_dataloader(made, batch_size=4, shuffle=shuffle, num_workers=0)
        for shuffle in (True, False)
    )


def network(passing, aggregation, predictor, **given):
    return models.MPNN(
        passing(d_h=16, depth=3),
        aggregation(),
        predictor(input_dim=16, hidden_dim=16, n_layers=2),
        init_lr=1e-2,
        max_lr=1e-2,
        final_lr=1e-3,
        **given,
    )


def entry(name, make, note) -> Published:
    return published(
        "chemprop",
        "MPNN",
        name=name,
        module=make,
        feed=loaders,
        left=names("predictor.ffn.2.2"),
        trusted=True,
        note=note,
    )


MODULES = [
    entry(
        "bonds",
        lambda: network(nn.BondMessagePassing, nn.MeanAggregation, nn.RegressionFFN),
        "messages along bonds, regression",
    ),
    entry(
        "atoms",
        lambda: network(
            nn.AtomMessagePassing, nn.NormAggregation, nn.BinaryClassificationFFN, batch_norm=True
        ),
        "messages between atoms, classification, batch norm",
    ),
]


@parametrized(MODULES, refused=False)
def test_it_trains_unedited(entry: Published, method: str, tmp_path: Path) -> None:
    train(entry, method, tmp_path)


def test_the_documentation_says_so() -> None:
    check_page("chemprop", MODULES)
