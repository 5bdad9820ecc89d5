"""What the data step writes without a browser."""

from gradio_app.pages.new.data_html import chosen
from gradio_app.texts import Texts

EXAMPLE = "package:demo/instructions.jsonl"


def test_an_own_model_on_the_example_is_asked_for_its_data():
    english, german = Texts("en"), Texts("de")
    assert "Choose your own data for your model" in chosen(EXAMPLE, english, own_model=True)
    assert "Wählen Sie eigene Daten" in chosen(EXAMPLE, german, own_model=True)
    assert 'class="not-now"' in chosen(EXAMPLE, english, own_model=True)
    assert "Choose your own data" not in chosen(EXAMPLE, english)
    assert "Choose your own data" not in chosen("rows.jsonl", english, own_model=True)
