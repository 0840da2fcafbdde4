"""edgekit serve"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from edgekit.cli.console import note, output, printable
from edgekit.errors import missing_extra

EXAMPLE = """\b
Examples:
  edgekit serve smollm2
  edgekit serve smollm2 t2-gr --listen 127.0.0.1:9000
  edgekit serve --config serve.toml
  edgekit serve --new-key telescope >> keys
A file, serve.toml:
  [models.chat]
  path = "smollm2"
  context = 8192
  [models.t2]
  path = "t2-gr"
"""


@click.command(epilog=EXAMPLE)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--config", "path", type=Path, help="TOML file with the configuration.")
@click.option("--listen", help="Address and port [default: 127.0.0.1:8400].")
@click.option("--memory", metavar="SIZE", help="Most memory for all models, such as 4GB [default: what is free].")
@click.option("--engine", help="Of each MODEL that is a language model: native, torch, llamacpp [default: native].")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of its cache [default: 4096].")
@click.option("--kv", help="How its cache stores keys and values [default: the engine's].")
@click.option("--threads", type=click.IntRange(1, 256), help="CPU threads of each MODEL [default: its own choice].")
@click.option("--new-key", metavar="NAME", help="Print a new API key, and its line for keys.file; serve nothing.")
def serve(models: tuple[str, ...], path: Path | None, listen: str | None, memory: str | None, new_key: str | None,
          **options: Any) -> None:  # fmt: skip
    """Serve each MODEL (a bundle, a .gguf file, a folder that transformers saved, or a model's name) over HTTP.

    Language models answer OpenAI's API under /v1, bundles the Open Inference Protocol under /v2. A model is loaded when
    somebody asks for it, if its memory fits. SIGTERM lets answers finish; SIGHUP reads keys and models again.
    """
    from runtimes.daemon import config as configuration

    if new_key is not None:
        from runtimes.daemon.keys import new_key as make

        key, line = make(new_key)
        note(f"the key, which is shown once: {key}")
        output.print(line, soft_wrap=True)
        return
    try:
        from runtimes.daemon.run import serve as run
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "serve", "edgekit serve") from None

    server = {name: value for name, value in (("listen", listen), ("memory", memory)) if value is not None}
    model = {name: value for name, value in options.items() if value is not None}

    def read() -> configuration.ServeConfig:
        return configuration.load(path, models, server=server, model=model)

    config = read()
    _log()
    run(config, read if path is not None else None, lambda url: note(f"serving {', '.join(config.models)} at {url}"))


def _log() -> None:
    """Write the daemon's log to standard error, a line for each event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("edgekit: %(message)s"))
    logger = logging.getLogger("edgekit")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # the daemon itself logs what fails; uvicorn would log it a second time, with tracebacks of a client's errors
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)


class _Lines(logging.Formatter):
    """A client's text in a message cannot move a terminal's cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")
