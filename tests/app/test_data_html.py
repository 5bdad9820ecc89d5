"""What the data step writes without a browser."""

from gradio_app.pages.new.data_html import selected_data
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
