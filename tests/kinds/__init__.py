import pytest

pytest.register_assert_rewrite("kinds.training")
