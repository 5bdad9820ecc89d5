import logging
import sys

import pytest

from lightning_peft.runs.log import logged_to


def test_what_is_printed_and_logged_is_in_the_file(tmp_path, capsys):
    path = tmp_path / "train.log"
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("tests.runs")
    logger.addHandler(handler)
    try:
        with logged_to(path):
            print("\x1b[1mfirst\x1b[0m")
            print("10 %\r50 %\r100 %", file=sys.stderr)
            logger.warning("third")
            print("no end", end="")
        print("after")
        logger.warning("after too")
    finally:
        logger.removeHandler(handler)
    assert path.read_text() == "first\n100 %\nthird\nno end\n"
    out, err = capsys.readouterr()
    assert out == "\x1b[1mfirst\x1b[0m\nno endafter\n"
    assert "third\nafter too\n" in err


def test_the_streams_come_back_after_an_error(tmp_path):
    before = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError), logged_to(tmp_path / "log"):
        raise RuntimeError
    assert (sys.stdout, sys.stderr) == before
