"""The command line. Every command, also of the core, is an entry point of the group `edgekit.commands`. So the core
names no command of another package, and a third party's package can add one."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click

from edgekit import __version__
from edgekit.cli.supervise import STOPPED, Terminated, supervise, terminating
from edgekit.errors import EdgekitError

GROUP = "edgekit.commands"
# The order in which a newcomer needs them. The other commands follow by name.
FIRST = (
    "models",
    "inspect",
    "compress",
    "quantize",
    "search",
    "doctor",
    "bench",
    "targets",
    "pack",
    "export",
    "run",
    "data",
    "import",
)

RAISE_MEMORY = "to allow more than what was free at the start: edgekit --memory-limit SIZE COMMAND"
RUN_MODELS = ("bench", "compress", "export", "import", "run")  # in a child process that can be ended at any moment


class LazyGroup(click.Group):
    """A group that imports the module of a command when click asks for the command or for the list of commands."""

    def __init__(self, *arguments: Any, lazy: Mapping[str, str], **options: Any) -> None:
        """lazy: the name of each command, and 'package.module:name' of its object, in the order of the help."""
        super().__init__(*arguments, **options)
        self.lazy = lazy

    def points(self) -> dict[str, EntryPoint]:
        """Return the entry points of the commands by name, in the order of the help."""
        return {name: EntryPoint(name, value, GROUP) for name, value in self.lazy.items()}

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.points())

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        point = self.points().get(name)
        return None if point is None else _loaded(point)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments name, as click does; the error names the commands most like it."""
        try:
            return super().resolve_command(context, arguments)
        except click.UsageError as error:
            near = [repr(name) for name in get_close_matches(arguments[0], self.points())]
            if not near or "such command" not in error.message:
                raise
            said = f"{error.message.rstrip('.')}. Did you mean {' or '.join(near)}?"
            raise click.UsageError(said, error.ctx) from None

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the whole first sentence of its own help; click would cut it at the end of the
        line."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, _loaded(point).get_short_help_str(limit=1000)) for name, point in self.points().items()]
            )


class InstalledCommands(LazyGroup):
    """The commands of all installed packages. No other package can replace a command of edgekit."""

    def points(self) -> dict[str, EntryPoint]:
        others_first = sorted(entry_points(group=GROUP), key=lambda point: _package(point).startswith("edgekit "))
        found = {point.name: point for point in others_first}
        if not found:
            raise EdgekitError(
                "no command is registered, because edgekit is not installed here or was installed before it had entry "
                "points for its commands; run: pip install edgekit (in a checkout: pip install -e .)"
            )
        names = [*(name for name in FIRST if name in found), *sorted(found.keys() - set(FIRST))]
        return {name: found[name] for name in names}


def _loaded(point: EntryPoint) -> click.Command:
    """Return the command that an entry point names. If it cannot be loaded, return a command that reports why: the
    package of one command must not break the others."""
    try:
        command = point.load()
        if isinstance(command, click.Command):
            return command
        reason: BaseException = TypeError(f"it is of the type {type(command).__name__}; expected a click command")
    except (Exception, SystemExit) as error:  # a module of a third party may raise anything when it is imported
        reason = error
    text = " ".join(f"{type(reason).__name__}: {reason}".split())

    def fail(arguments: tuple[str, ...]) -> None:
        raise EdgekitError(
            f"the command {point.name!r} of {_package(point)} cannot be loaded from {point.value}: {text}; repair, "
            "update or uninstall that package"
        ) from reason

    return click.Command(
        point.name,
        callback=fail,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        short_help=f"(cannot be loaded: {text})",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )


def _package(point: EntryPoint) -> str:
    """Return the name and version of the distribution that registers the entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "edgekit itself"


@click.group(cls=InstalledCommands, lazy={}, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--trust", multiple=True, help="package.module:function that a bundle may run to build its network.")
@click.option("--read-limit", help="Memory that a file may take, such as 20GB [default: 32 times its size].")
@click.option("--time-limit", help="CPU seconds in which a model is opened and tried out [default: 120].")
@click.option("--memory-limit", help="Memory that a command that runs models may take [default: what is free].")
@click.pass_context
def edgekit(
    context: click.Context,
    debug: bool,
    trust: tuple[str, ...],
    read_limit: str | None,
    time_limit: str | None,
    memory_limit: str | None,
) -> None:
    """Compress, export, verify and run trained networks on hardware people already own.

    Start with: edgekit models
    """
    if trust:
        os.environ["EDGEKIT_TRUST"] = ",".join([*trust, *filter(None, [os.environ.get("EDGEKIT_TRUST")])])
    allowed = None
    if read_limit is not None or memory_limit is not None:
        from edgekit.bundle.bounded import VARIABLE, parse_size

        if read_limit is not None:
            os.environ[VARIABLE] = str(parse_size(read_limit))
        allowed = None if memory_limit is None else parse_size(memory_limit, "memory limit")
    if time_limit is not None:
        os.environ["EDGEKIT_TIME_LIMIT"] = time_limit
    if context.obj is not None and context.invoked_subcommand in RUN_MODELS:
        context.obj(allowed)


def main(supervised: Callable[[int | None], None] | None = supervise) -> None:
    """Run the console script. It prints one line for each error and exits with status 1, with 2 for wrong usage, with
    130 for Ctrl-C, or with 143 for SIGTERM.

    supervised: is called before a command that runs models; None in a process that must not fork."""
    debug = edgekit.make_context("edgekit", sys.argv[1:], resilient_parsing=True).params["debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack letters that a name has
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore", UserWarning)  # libraries warn about the content of files, in several lines
        warnings.filterwarnings("ignore", r".* encountered in ", RuntimeWarning)  # numpy, about the numbers in them
    try:
        from edgekit.plugins import refuse_strangers

        with terminating():
            refuse_strangers()
            status = edgekit.main(prog_name="edgekit", standalone_mode=False, obj=supervised)
        sys.exit(status if isinstance(status, int) else 0)
    except BrokenPipeError:  # the program that reads the pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (click.ClickException, click.Abort, KeyboardInterrupt, Terminated) as error:
        sys.exit(_fail(*_explained(error)))
    except (EdgekitError, MemoryError, OSError) as error:
        if debug:
            raise
        sys.exit(_fail(*_explained(error)))


def _explained(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit status for an error."""
    if isinstance(error, Terminated):
        return "stopped", 128 + signal.SIGTERM
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "stopped", STOPPED
    if isinstance(error, click.UsageError):
        hint = f" (see: {error.ctx.command_path} --help)" if error.ctx else ""
        return error.format_message().rstrip(".") + hint, 2
    if isinstance(error, click.ClickException):
        return error.format_message(), 1
    if isinstance(error, MemoryError):
        return f"out of memory ({error or 'no detail given'}); {RAISE_MEMORY}", 1
    if isinstance(error, OSError):  # no permission, disk full, a file where a folder should be
        return f"{error.filename or 'file system'}: {error.strerror or error}", 1
    return str(error), 1


def _fail(message: str, status: int) -> int:
    from edgekit.cli.console import printable

    print(printable(f"edgekit: {' '.join(message.split())}"), file=sys.stderr)
    return status
