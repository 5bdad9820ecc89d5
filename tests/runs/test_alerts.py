import pytest

from lightning_peft.runs.alerts import training_alert, validation_alert


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([], None),
        ([2.0, float("nan")], "nan"),
        ([2.0, float("inf")], "nan"),
        ([1.0] * 10 + [1.4] * 10, None),
        ([1.0] * 10 + [1.6] * 10, "diverging"),
        ([1.0] * 10 + [1.6] * 9, None),
        ([2.0, 0.1] * 40, None),
    ],
)
def test_what_training_losses_say(losses, kind):
    found = training_alert(losses)
    assert (found and found.kind) == kind


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([], None),
        ([1.0, 1.1], None),
        ([1.0, 1.1, 1.2], "overfitting"),
        ([1.0, 1.1, 1.05], None),
        ([1.1, 1.0, 1.1, 1.2], "overfitting"),
        ([float("nan")], "nan"),
    ],
)
def test_what_validation_losses_say(losses, kind):
    found = validation_alert(losses)
    assert (found and found.kind) == kind
