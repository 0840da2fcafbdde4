"""The command line. Each verb lives in its own module and is imported only when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from edgekit import __version__
from edgekit.errors import EdgekitError

# verb -> (module:object, what the overview says); listed here so that `edgekit --help` imports none of them
COMMANDS = {
    "models": ("edgekit.cli.models:models", "List the models that come with edgekit."),
    "inspect": ("edgekit.cli.inspect:inspect", "Show what a bundle holds and how it was made."),
    "compress": ("edgekit.cli.compress:compress", "Make a model smaller and faster; keep only what measures better."),
    "doctor": ("edgekit.cli.doctor:doctor", "Say what this machine can run, and what stands in the way."),
    "bench": ("edgekit.cli.bench:bench", "Time models beside each other, in turns in one run."),
    "targets": ("edgekit.cli.targets:targets", "List devices: what they can, what works on them, what never to use."),
    "pack": ("edgekit.cli.pack:pack", "Write a bundle as one entropy-coded file."),
    "export": ("edgekit.cli.export:export", "Write a model for a runtime or device, and prove that it still works."),
    "run": ("edgekit.cli.run:run", "Run a bundle on named arrays."),
    "alerts": ("alert_broker.commands:alerts", "Classify or simulate astronomical alerts."),
    "data": ("edgekit.cli.data:data", "Prepare a data set that models are measured on."),
    "import": ("edgekit.cli.import_:import_", "Make a bundle from an ONNX file, a torch program or a Python function."),
    "import-t2": ("alert_broker.commands.import_t2:import_t2", "Make a bundle from published t2 weights."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def __init__(self, *arguments: Any, lazy: dict[str, tuple[str, str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lazy = lazy

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in self.lazy:
            return None
        module, attribute = self.lazy[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self.lazy.items()])


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgekit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--trust", multiple=True, help="package.module:function that a bundle may run to build its network.")
def edgekit(debug: bool, trust: tuple[str, ...]) -> None:
    """Compress, export, verify and run trained networks on hardware people already own.

    Start with: edgekit models
    """
    if trust:
        os.environ["EDGEKIT_TRUST"] = ",".join([*trust, *filter(None, [os.environ.get("EDGEKIT_TRUST")])])


def main() -> None:
    """Entry point of the console script: one line per error, exit status 1, or 2 for wrong usage, or 130 for Ctrl-C."""
    debug = "--debug" in sys.argv[1:2]
    try:
        from edgekit._siblings import refuse_strangers

        refuse_strangers()
        status = edgekit.main(prog_name="edgekit", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except EdgekitError as error:
        if debug:
            raise
        sys.exit(_fail(str(error), 1))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        hint = f" (see: {error.ctx.command_path} --help)" if error.ctx else ""
        sys.exit(_fail(error.format_message().rstrip(".") + hint, 2))
    except click.ClickException as error:
        sys.exit(_fail(error.format_message(), 1))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_fail("stopped", 130))
    except BrokenPipeError:  # the reader of a pipe, such as `head`, went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # no permission, disk full, a file where a folder should be
        if debug:
            raise
        sys.exit(_fail(f"{error.filename or 'file system'}: {error.strerror or error}", 1))


def _fail(message: str, status: int) -> int:
    print(f"edgekit: {' '.join(message.split())}", file=sys.stderr)
    return status
