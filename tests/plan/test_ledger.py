import torch

from lightning_peft.plan.ledger import Ledger


def test_a_storage_counts_from_when_it_is_made_until_it_is_let_go():
    ledger = Ledger()
    with ledger:
        kept = torch.zeros(100)
        view = kept.view(10, 10)[:5]
        gone = torch.zeros(1000)
        assert ledger.total == 4 * 1100
        del gone
        assert ledger.total == 400
        del kept
        assert ledger.total == 400
        del view
    assert ledger.total == 0
    assert ledger.peak == 4 * 1100


def test_what_is_held_for_backward_counts():
    ledger = Ledger()
    weight = torch.randn(8, 8, requires_grad=True)
    with ledger:
        loss = (torch.ones(4, 8) @ weight).exp().sum()
        # The input of the product and the result of exp.
        assert ledger.total >= 2 * 4 * 8 * 4
        loss.backward()
        del loss
        assert ledger.total == weight.grad.nbytes


def test_purposes():
    ledger = Ledger(vocabulary=50)
    weight = torch.zeros(10, 50)
    assert ledger.enter([weight, weight.t()], "weights") == 2000
    with ledger:
        logits = torch.ones(3, 10) @ weight
        assert ledger.live["logits"] == logits.nbytes
        ledger.enter([logits], "moved")
    assert ledger.live["logits"] == 0
    assert ledger.live["moved"] == logits.nbytes
    assert ledger.at_peak == {"weights": 2000, "logits": 600, "activations": 120}


def test_a_mask_is_not_all_true_in_a_padded_batch():
    for padded in (False, True):
        with Ledger(padded=padded):
            assert bool(torch.ones(3).all()) is not padded
