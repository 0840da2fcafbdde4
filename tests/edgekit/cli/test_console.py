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


def test_a_path_in_brackets_is_shown_in_a_progress_bar():
    """As markup, `[/x]` would close a tag that nobody opened, which is an error."""
    with console.progress() as bar:
        bar.add_task("t2[/x].edge: rows", total=2)
        assert bar.columns[0].render(bar.tasks[0]).plain == "t2[/x].edge: rows"


HOSTILE = "a\x1b[31mred\x07\x9b1m\x7f\x00\r\u202eltr\ud800\u2028z"


def test_nothing_in_a_name_reaches_the_terminal_as_a_command(capsys):
    console.output.print(HOSTILE)
    console.output.print("title", HOSTILE, style="bold")
    console.print_table([HOSTILE], [[HOSTILE]], title=HOSTILE)
    console.note(HOSTILE)
    console.print_json({HOSTILE: HOSTILE})
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert r"a\x1b[31mred" in printed.out
    assert console.printable("å – 猫\t\n", keep="\n\t") == "å – 猫\t\n", "the twin: letters of every script stay"


def test_a_plain_console_of_rich_would_pass_it_on(capsys):
    from rich.console import Console

    Console().print(HOSTILE.replace("\ud800", ""))
    assert "\x1b" in capsys.readouterr().out


def test_every_command_prints_through_these_functions():
    """The test lists all calls in the commands that print, and expects only these functions."""
    import ast
    from pathlib import Path

    found = []
    for path in sorted(Path(console.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write", "Console"):
                    found.append(f"{path.name}: {name}")
    # one line for an error, which is escaped; JSON, which is ASCII; what a confined process printed, which is escaped;
    # why a command was ended, which is escaped
    expected = ["__init__.py: print", "console.py: sys.stdout.write", "inspect.py: click.echo", "supervise.py: print"]
    assert found == expected


def test_an_error_is_escaped_and_fits_any_encoding(edgekit):
    finished = edgekit("inspect", "no-such\x1b[31m\u202e\ud800.edge")
    assert finished.status == 1
    assert all(letter.isprintable() or letter == "\n" for letter in finished.err)


ESCAPES = "a\x1b[2J\x1b]0;x\x07\r\nb\udcff\u202ec é 日"


def test_nothing_that_changes_a_terminal_is_printed(capfd):
    console.print_table(["name"], [[ESCAPES]])
    console.note(ESCAPES)
    printed = "".join(capfd.readouterr())
    shown = r"a\x1b[2J\x1b]0;x\x07\r\nb\udcff\u202ec é 日"
    assert printed.count(shown) == 2
    assert set(printed) <= {*shown, *"name \n"}
    assert console.printable("plain é 日") == "plain é 日"
