"""What the data step writes without a browser."""

from gradio_app.pages.new.data_html import report, selected_data
from gradio_app.recipe.preview import DataReport
from gradio_app.texts import Texts


def test_data_is_requested_where_none_is_chosen():
    for language, asked in (("en", "Choose the data"), ("de", "W\u00e4hlen Sie die Daten")):
        made = selected_data("", Texts(language))
        assert 'class="not-now"' in made
        assert asked in made
    for place in ("package:demo/instructions.jsonl", "rows.jsonl"):
        made = selected_data(place, Texts("en"))
        assert 'class="chosen"' in made
        assert place.rpartition("/")[2] in made


def test_images_of_rows_are_shown_and_none_from_an_address():
    inside = "data:image/png;base64,aGk="
    runs = [
        {"trained": False, "text": "[image of 3 x 2 <pixels>]", "image": inside},
        {"trained": False, "text": "[other]", "image": "https://example.org/1.png"},
        {"trained": True, "text": "A cat.", "image": None},
    ]
    numbers = {
        "first_rows": [{"row": 1, "runs": runs}],
        "splits": {"train": {"rows": 1}},
        "columns": {},
        "rows": 1,
    }
    made = str(report(DataReport(numbers), Texts("en")))
    shown = f'<img class="row-image" src="{inside}" alt="[image of 3 x 2 &lt;pixels&gt;]">'
    assert made.count("<img") == made.count(shown) == 1
    assert "example.org" not in made
