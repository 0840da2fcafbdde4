"""The command line as a whole: exit statuses, one-line errors, help, and how little it imports."""

import re
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from edgekit import __version__, cli
from edgekit.cli import FIRST, GROUP
from edgekit.cli import edgekit as root
from edgekit.errors import EdgekitError

COMMANDS = {point.name: point for point in entry_points(group=GROUP)}
HEAVY = {"torch", "onnxruntime", "onnx", "numba", "pyarrow", "pandas", "scipy", "matplotlib", "jinja2", "numpy"}


def commands(group=root, path=()):
    """Yield every command with its path, also those of groups."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def imported(*arguments: str) -> set[str]:
    """Return the top-level packages that a new interpreter imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


@pytest.fixture
def verb(monkeypatch, points):
    """Return verb(function), which installs a command `edgekit boom` that calls the function."""

    def install(function):
        module = type(sys)("planted")
        module.boom = click.Command("boom", callback=function)
        monkeypatch.setitem(sys.modules, "planted", module)
        points([*COMMANDS.values(), EntryPoint("boom", "planted:boom", GROUP)])

    return install


@pytest.fixture
def points(monkeypatch):
    """Return points(list), which sets the installed entry points for one test."""
    return lambda found: monkeypatch.setattr(cli, "entry_points", lambda group: found)


@pytest.fixture
def broken(points, monkeypatch, tmp_path):
    """Return broken(text), which installs another package's command `star` in a module with this text."""

    def install(text, *, name="star"):
        (tmp_path / "star_package.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "star_package", raising=False)
        point = EntryPoint(name, "star_package:star", GROUP)
        vars(point)["dist"] = SimpleNamespace(name="starkit", version="1.2")
        points([*COMMANDS.values(), point])

    return install


def raising(error):
    def function():
        raise error

    return function


def test_success(edgekit):
    assert edgekit("--version").status == 0
    done = edgekit("--help")
    assert done.status == 0
    assert all(name in done.out for name in COMMANDS)


def test_nothing_at_all_prints_the_help_in_lines(edgekit):
    done = edgekit()
    assert done.status == 2
    assert len((done.out + done.err).splitlines()) > 10


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (EdgekitError("the thing is\n  broken"), 1, "the thing is broken"),
        (click.UsageError("what?"), 2, "what?"),
        (click.ClickException("no"), 1, "no"),
        (KeyboardInterrupt(), 130, "stopped"),
        (PermissionError(13, "Permission denied", "/somewhere/x"), 1, "/somewhere/x: Permission denied"),
        (OSError(28, "No space left on device"), 1, "No space left"),
    ],
)
def test_errors_are_one_line_and_have_their_status(error, status, words, edgekit, verb):
    verb(raising(error))
    if isinstance(error, KeyboardInterrupt):
        done = edgekit("boom")
        assert (done.status, done.err.strip()) == (130, "edgekit: stopped")
    else:
        assert edgekit("boom").failed_with(status, words)


@pytest.mark.parametrize("flags", [[], ["-W", "default"]], ids=["plain", "asked for"])
def test_warnings_of_libraries_about_files_are_printed_only_if_python_is_asked_for_them(flags):
    program = (
        "import sys, warnings, click, numpy\n"
        "from edgekit import cli\n"
        "def boom(debug):\n"
        "    warnings.warn('truncated')\n"
        "    numpy.float32(3e38) * numpy.float32(9)\n"
        "    warnings.warn('another runtime', RuntimeWarning)\n"
        "cli.edgekit = click.Command('boom', params=[click.Option(['--debug'], is_flag=True)], callback=boom)\n"
        "sys.argv = ['edgekit']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "another runtime" in done.stderr
    assert ("truncated" in done.stderr) == ("overflow encountered" in done.stderr) == bool(flags)


def test_a_status_that_a_command_returns_is_the_programs(edgekit, verb):
    verb(lambda: 3)
    assert edgekit("boom").status == 3


def test_a_bug_is_not_hidden(verb, monkeypatch):
    from edgekit.cli import main

    verb(raising(ZeroDivisionError("bug")))
    monkeypatch.setattr(sys, "argv", ["edgekit", "boom"])
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize("flags", [["--debug"], ["--time-limit", "60", "--debug"]], ids=["first", "later"])
def test_debug_shows_the_traceback(flags, verb, monkeypatch):
    from edgekit.cli import main

    verb(raising(EdgekitError("broken")))
    monkeypatch.setenv("EDGEKIT_TIME_LIMIT", "60")
    monkeypatch.setattr(sys, "argv", ["edgekit", *flags, "boom"])
    with pytest.raises(EdgekitError, match="broken"):
        main()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], ["No such command 'nope'"]),
        (["--nope"], ["No such option"]),
        (["compress"], ["Missing argument 'MODEL'", "edgekit compress --help"]),
        (["compress", "x", "--seed", "one"], ["'one' is not a valid integer"]),
        (["pack", "x"], ["Missing option '-o'"]),
        (["exprt"], ["No such command 'exprt'. Did you mean 'export'?"]),
        (["alerts", "clasify"], ["No such command 'clasify'. Did you mean 'classify'?", "edgekit alerts --help"]),
        (["export", "x"], ["--to is missing", "one of c, onnx, openvino, tensorrt"]),
        (["export", "x", "--to", "c"], ["-o/--output is missing", "such as -o c"]),
    ],
)
def test_wrong_usage_is_2_and_says_where_help_is(arguments, words, edgekit):
    assert edgekit(*arguments).failed_with(2, *words, "--help")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_imports_and_is_called_what_it_is_called(name):
    command = COMMANDS[name].load()
    assert isinstance(command, click.Command)
    assert command.name == name


def listed(text: str) -> dict[str, str]:
    """Return the commands of a help text in their order, each with its line."""
    rows: dict[str, str] = {}
    for line in text.partition("Commands:\n")[2].splitlines():
        if (begins := re.match(r"  (\S+) +(.*)", line)) is not None:
            rows[begins[1]] = begins[2].strip()
        else:  # a sentence goes on, perhaps within a word with a hyphen
            last = list(rows)[-1]
            rows[last] += ("" if rows[last].endswith("-") else " ") + line.strip()
    return rows


def test_the_help_lists_the_core_first_and_each_commands_own_sentence(edgekit):
    found = listed(edgekit("--help").out)
    assert list(found) == [*FIRST, "alerts", "import-braai", "import-t2", "llm", "serve"]
    for name, sentence in found.items():
        assert " ".join(COMMANDS[name].load().help.split()).startswith(sentence.rstrip(".")), name


def test_the_core_names_no_command_of_another_package():
    assert {COMMANDS[name].value.split(".")[0] for name in FIRST} == {"edgekit"}
    assert {point.value.split(".")[0] for name, point in COMMANDS.items() if name not in FIRST} == {
        "alert_broker",
        "runtimes",
    }


def test_a_command_of_another_package_is_found(edgekit, broken):
    broken("import click\n@click.command()\ndef star():\n    'Show a star. And more.'\n    print('*')")
    assert listed(edgekit("--help").out)["star"] == "Show a star."
    assert edgekit("star").out == "*\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import there_is_no_such_package", "No module named 'there_is_no_such_package'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(7)", "SystemExit: 7"),
        ("x = 1", "has no attribute 'star'"),
        ("star = 1", "it is of the type int; expected a click command"),
    ],
)
def test_a_command_that_cannot_be_loaded_says_why_and_breaks_no_other(text, reason, edgekit, broken):
    broken(text)
    done = edgekit("--help")
    assert done.status == 0
    found = listed(done.out)
    assert reason in found["star"]
    assert "cannot be loaded" in found["star"]
    assert list(found) == [*FIRST, "alerts", "import-braai", "import-t2", "llm", "serve", "star"]
    for arguments in ([], ["--help"], ["--option", "value", "more"]):
        assert edgekit("star", *arguments).failed_with(
            1, "'star' of starkit 1.2", reason, "star_package:star", "update"
        )
    assert edgekit("--debug", "models").status == 0


def test_another_package_cannot_replace_a_command_of_edgekit(edgekit, broken):
    broken("import click\n@click.command()\ndef star():\n    print('*')", name="models")
    assert edgekit("models").out != "*\n"


def test_without_entry_points_the_remedy_is_named(edgekit, points):
    points([])
    for arguments in (["--help"], ["models"]):
        assert edgekit(*arguments).failed_with(1, "edgekit is not installed", "run: pip install")
    assert edgekit("--version").out.split()[-1] == __version__


def test_every_command_has_help_and_an_example():
    found = dict(commands())
    assert len(found) >= len(COMMANDS)
    for path, command in found.items():
        assert command.help, path
        assert f"edgekit {path} " in (command.epilog or ""), f"{path}: no example at the end of its help"
        for option in command.get_params(click.Context(command)):
            if isinstance(option, click.Option):
                assert option.help or option.name == "seed", f"{path}: --{option.name} has no help"


def test_every_example_has_options_that_exist():
    import re

    for path, command in commands():
        known = {
            name
            for option in command.get_params(click.Context(command))
            for name in (*option.opts, *option.secondary_opts)
        }
        for line in (command.epilog or "").splitlines():
            if f"edgekit {path} " in line:
                used = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", line.split("edgekit", 1)[1]))
                assert used <= known, f"{path}: {used - known}"


def test_import_edgekit_and_help_are_light():
    assert not imported("-c", "import edgekit") & HEAVY
    help_text = imported("-c", "import sys; sys.argv = ['edgekit', '--help']; from edgekit.cli import main; main()")
    assert "click" in help_text
    assert not help_text & HEAVY
    assert "numpy" in imported("-c", "import edgekit.bundle.format"), "the twin: the test sees imports"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "alerts"])
def test_the_help_of_a_command_needs_no_torch(name):
    arguments = f"import sys; sys.argv = ['edgekit', '{name}', '--help']; from edgekit.cli import main; main()"
    assert not imported("-c", arguments) & {"torch", "onnxruntime", "onnx", "numba", "matplotlib", "pyarrow"}


def test_the_console_script_runs():
    script = Path(sys.executable).with_name("edgekit")
    done = subprocess.run([script, "compress", "no.edge", "-o", "x.edge"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("edgekit: no.edge: no such bundle")
    assert done.stdout == ""


def test_a_reader_that_goes_away_is_no_error():
    script = Path(sys.executable).with_name("edgekit")
    done = subprocess.run(f"{script} models --json | true", shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_output_is_printed_as_it_is(capsys):
    """A path in brackets is not markup, and a colon is not an emoji."""
    from edgekit.cli.console import output, print_table

    output.print("data[red].npz :bug:")
    print_table(["name [b]"], [["x[bold]y"]])
    printed = capsys.readouterr().out
    assert "data[red].npz :bug:" in printed
    assert "x[bold]y" in printed
    assert "name [b]" in printed
