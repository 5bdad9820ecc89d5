import random

import pytest

from lightning_peft.plan.method_comparison import _largest, largest_batch, longest_sequence
from lightning_peft.plan.prediction import predict
from lightning_peft.plan.settings import PlanSettings
from lightning_peft.plan.sources import from_name


def test_the_search_is_right_for_every_convex_need():
    chance = random.Random(0)
    for _ in range(500):
        base, each = chance.uniform(0, 100), chance.uniform(0.01, 10)
        bend = chance.choice([0, 0, 1e-3, 1e-2])

        def need(count, base=base, each=each, bend=bend):
            return base + each * count + bend * count**2

        room, start, most = chance.uniform(1, 5000), chance.randint(1, 600), chance.randint(1, 900)
        right = max([count for count in range(1, most + 1) if need(count) <= room], default=0)
        assert _largest(need, {start: need(start)}, room, most) == right


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_largest_batch_fits_and_one_more_does_not(folder, method):
    source = from_name(str(folder()))
    run = PlanSettings(method, batch_size=4, seq_len=64)
    room = 810_000_000
    plan = predict(source, run)
    rows = largest_batch(source, plan, room)
    assert rows > 4
    assert predict(source, PlanSettings(method, batch_size=rows, seq_len=64)).fits(room)
    assert not predict(source, PlanSettings(method, batch_size=rows + 1, seq_len=64)).fits(room)
    assert largest_batch(source, plan, 1000) == 0
    # What the model was made for is the end.
    assert longest_sequence(source, plan, 10**12) == 256
