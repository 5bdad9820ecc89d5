"""What the data step writes without a browser."""

from gradio_app.pages.new import data_html, file_format
from gradio_app.pages.new.data_html import report, selected_data
from gradio_app.recipe.preview import DataReport
from gradio_app.texts import Texts

NAMES = ("20261130-ab-x.csv", "20261130-cd-x.csv")


def test_data_is_requested_where_none_is_chosen():
    for language, asked in (("en", "No data chosen"), ("de", "Noch keine Daten")):
        made = selected_data("", Texts(language))
        assert 'class="not-now"' in made
        assert asked in made
    for place in ("package:demo/instructions.jsonl", "rows.jsonl"):
        made = selected_data(place, Texts("en"))
        assert 'class="chosen"' in made
        assert place.rpartition("/")[2] in made


def test_images_and_sounds_of_rows_are_shown_and_none_from_an_address():
    inside = "data:image/png;base64,aGk="
    runs = [
        {"trained": False, "text": "[image of 3 x 2 <pixels>]", "image": inside},
        {"trained": False, "text": "[other]", "image": "https://example.org/1.png"},
        {"trained": False, "text": "[<recording>]", "audio": "data:audio/wav;base64,aGk="},
        {"trained": False, "text": "[other]", "audio": "https://example.org/1.wav"},
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
    sound = 'src="data:audio/wav;base64,aGk=" aria-label="[&lt;recording&gt;]"'
    assert made.count("<audio") == made.count(sound) == 1
    assert "example.org" not in made


def test_numbers_on_all_rows_are_shown_and_escaped():
    numbers = {
        "splits": {"train": {"rows": 8}, "validation": {"rows": 2}},
        "rows": 10,
        "max_length": 40,
        "lengths": {
            **{"mean": 20.5, "median": 19, "percentile_95": 38, "longest": 40},
            "buckets": [
                {"from": 1, "to": 40, "rows": 6, "cut": False},
                {"from": 41, "to": 1200, "rows": 2, "cut": True},
            ],
        },
        "statistics": {
            **{"duplicates": 3, "in_two_splits": 1, "shared_prompts": 4, "over_long": 0},
            "tokens": 2050,
            "turns": {"conversations": 10, "least": 2, "most": 6, "roles": {"<user>": 30}},
            "writing": {"Latin": 9, "Han": 1},
            "languages": {"de": 7, "pt_BR": 2, "qq": 1},
            "near_duplicates": 2,
            "near_duplicate_rows": [
                {"file": NAMES[0], "row": 8, "like_file": NAMES[0], "like_row": 3},
                {"file": NAMES[1], "row": 2, "like_file": NAMES[0], "like_row": 3},
            ],
            "label_counts": {"train": {"<b>": 6, "c": 2}, "validation": {"d": 2}},
            "longest_rows": [{"file": NAMES[0], "row": 7, "length": 40, "text": "<i>Once"}],
        },
        "read_as": [{"file": name, "usual": True} for name in NAMES],
    }
    made = str(report(DataReport(numbers), Texts("de")))
    for shown in (
        "2.050",
        "Median 19, p95 38",
        "2 bis 6",
        "&lt;user&gt; 30",
        "Latin 9, Han 1",
        "Deutsch 7, Portugiesisch 2, qq 1",
        "Zeile 8 ({0}) wie 3 ({0}), Zeile 2 ({1}) wie 3 ({0})".format(*NAMES),
    ):
        assert shown in made
    assert "1 Zeilen in beiden, 4 Prompts mit anderen Antworten" in made
    assert "41\u20131.200" in made
    assert made.count("(gek\u00fcrzt)") == made.count('class="cut"') == 1
    assert '<th scope="row">&lt;b&gt;</th><td>6</td><td>0</td>' in made
    assert '<th scope="row">d</th><td>0</td><td>2</td>' in made
    assert "&lt;i&gt;Once" in made
    # Two uploads of one name.
    assert f"Zeile 7 ({NAMES[0]})" in made
    assert "<i>" not in made


def test_rows_of_a_file_are_named_in_the_language_of_the_page():
    rows = [{"file": f"{name}.csv", "row": n, "detail": ""} for name in "ab" for n in range(1, 20)]
    one = {"kind": "empty", "rows": rows, "numbers": "1-19 of a.csv; 1-19 of b.csv"}
    one |= {"title": "", "what_to_do": ""}
    shown = data_html._problem(one, {}, Texts("de"))["rest"]
    assert "Zeilen 1-19 von a.csv; 1-19 von b.csv." in shown


def test_files_of_the_same_name_are_distinguished():
    usual = {"kind": "CSV", "encoding": "cp1252", "usual": False}
    for files, shown in (
        (("en/rows.csv", "de/rows.csv"), ("en/rows.csv: ", "de/rows.csv: ")),
        ((NAMES[0].replace("-ab-", "-0123abcd-"), "y.csv"), ("x.csv: ", "y.csv: ")),
    ):
        numbers = {"read_as": [{**usual, "file": file} for file in files]}
        found = file_format.unusual_formats(DataReport(numbers), Texts("en"))
        assert all(line.startswith(one) for line, one in zip(found, shown, strict=True))
