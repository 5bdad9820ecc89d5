import torch

from lightning_peft.plan.memory_tracker import MemoryTracker


def test_a_storage_counts_from_when_it_is_made_until_it_is_let_go():
    tracker = MemoryTracker()
    with tracker:
        kept = torch.zeros(100)
        view = kept.view(10, 10)[:5]
        gone = torch.zeros(1000)
        assert tracker.total == 4 * 1100
        del gone
        assert tracker.total == 400
        del kept
        assert tracker.total == 400
        del view
    assert tracker.total == 0
    assert tracker.peak == 4 * 1100


def test_what_is_held_for_backward_counts():
    tracker = MemoryTracker()
    weight = torch.randn(8, 8, requires_grad=True)
    with tracker:
        loss = (torch.ones(4, 8) @ weight).exp().sum()
        # The input of the product and the result of exp.
        assert tracker.total >= 2 * 4 * 8 * 4
        loss.backward()
        del loss
        assert tracker.total == weight.grad.nbytes


def test_purposes():
    tracker = MemoryTracker(vocabulary=50)
    weight = torch.zeros(10, 50)
    assert tracker.enter([weight, weight.t()], "weights") == 2000
    with tracker:
        logits = torch.ones(3, 10) @ weight
        assert tracker.live["logits"] == logits.nbytes
        tracker.enter([logits], "moved")
    assert tracker.live["logits"] == 0
    assert tracker.live["moved"] == logits.nbytes
    assert tracker.at_peak == {"weights": 2000, "logits": 600, "activations": 120}


def test_a_mask_is_not_all_true_in_a_padded_batch():
    for padded in (False, True):
        with MemoryTracker(padded=padded):
            assert bool(torch.ones(3).all()) is not padded
