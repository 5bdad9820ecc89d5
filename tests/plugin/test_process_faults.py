"""Each fault that processes had elsewhere ends all of them with an error that names it."""

from __future__ import annotations

import pytest
from process_faults import CASES, FOUND, RESUMED, check_answers


@pytest.mark.long
def test_faults_are_found_in_all_processes(run_processes, tmp_path):
    assert {*CASES, *RESUMED} <= {*FOUND, "resumed"}
    ranks = run_processes(tmp_path, 2, *FOUND, "resumed", script="process_faults.py")
    check_answers(ranks, FOUND)
    for rank in ranks:
        assert rank["sound"] == rank["resumed"] == "trained"
        assert "saves little to no memory: model.model." in rank["replicated"]
