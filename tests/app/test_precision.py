"""The default precision and its help come from one rule, for the model and the machine."""

import pytest

from gradio_app.pages.new.method import hint
from gradio_app.recipe import edits, precision
from gradio_app.recipe.content import value_at
from gradio_app.recipe.edits import base_recipe, with_model
from gradio_app.recipe.fields import BY_PATH
from gradio_app.recipe.precision import classify_cpu, classify_gpu, detect_bfloat16
from gradio_app.texts import LANGUAGES, Texts

FIELD = BY_PATH["trainer.precision"]


@pytest.mark.parametrize(
    ("task", "tiny", "kind", "value"),
    [
        ("sft", False, "gpu", "bf16-mixed"),
        ("sft", False, "old_gpu", "16-mixed"),
        ("translation", False, "old_gpu", "32-true"),
        ("sft", False, "cpu", "bf16-mixed"),
        ("sft", False, "old_cpu", "32-true"),
        ("sft", False, "unknown", "bf16-mixed"),
        ("sft", True, "gpu", "32-true"),
    ],
)
def test_default_and_help_agree_on_every_machine(task, tiny, kind, value, monkeypatch):
    monkeypatch.setattr(edits, "detect_bfloat16", lambda: kind)
    content = base_recipe(task)
    if not tiny:
        content = with_model(content, "google-t5/t5-small", None)
    assert value_at(content, FIELD.path) == value
    reason = precision.default_precision(task, tiny, kind).reason
    for language in LANGUAGES:
        t = Texts(language)
        said = hint(FIELD, content, t)
        assert said.startswith(value)
        assert t(f"fields.precision_{reason}") in said


def test_on_this_machine_too():
    content = with_model(base_recipe("sft"), "me/our", None)
    assert detect_bfloat16() in ("gpu", "old_gpu", "cpu", "old_cpu", "unknown")
    assert hint(FIELD, content, Texts()).startswith(value_at(content, FIELD.path))


def test_what_a_machine_computes_bfloat16_with(tmp_path):
    kinds = [classify_gpu(said) for said in ("8.6\n8.6\n", "7.5\n", "10.0", "[N/A]", "")]
    assert kinds == ["gpu", "old_gpu", "gpu", "unknown", "unknown"]
    file = tmp_path / "cpuinfo"
    assert classify_cpu(file) == "unknown"
    for text, kind in (
        ("flags\t\t: fpu avx512_bf16 sse\n", "cpu"),
        ("Features\t: fp asimd bf16\n", "cpu"),
        ("flags\t\t: fpu avx2 avx512f\n", "old_cpu"),
        ("processor\t: 0\n", "unknown"),
    ):
        file.write_text(text)
        assert classify_cpu(file) == kind
