"""Output that commands share on the terminal."""

import json

import click
import pytest

from edgekit.cli import console


def test_batch_sizes():
    assert console.batch_sizes("1,16, 256") == (1, 16, 256)


@pytest.mark.parametrize("text", ["", "1,x", "0", "1,-2", "1.5"])
def test_batch_sizes_that_are_none(text):
    with pytest.raises(click.UsageError, match="--batch"):
        console.batch_sizes(text)


def test_json_is_free_of_nan(capsys):
    console.print_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        console.print_json({"a": float("nan")})


def test_columns_of_numbers_are_aligned_right_and_brackets_are_kept(capsys):
    console.print_table(["name", "count"], [["data[1]", "5"], ["b", "1,000"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip()[-5:] for line in lines] == ["count", "    5", "1,000"]
    assert "data[1]" in lines[1]


def test_steps_start_again_for_work_of_the_same_name():
    with console.steps() as show:
        for _ in range(2):
            show("epochs", 0, 3)
            show("epochs", 3, 3)
        show("epochs", 1, 5)


ESCAPES = "a\x1b[2J\x1b]0;x\x07\r\nb\udcff\u202ec é 日"


def test_nothing_that_changes_a_terminal_is_printed(capfd):
    console.print_table(["name"], [[ESCAPES]])
    console.note(ESCAPES)
    printed = "".join(capfd.readouterr())
    shown = r"a\x1b[2J\x1b]0;x\x07\r\nb\udcff\u202ec é 日"
    assert printed.count(shown) == 2
    assert set(printed) <= {*shown, *"name \n"}
    assert console.printable("plain é 日") == "plain é 日"
