"""docs/jobs/serve.md: its table is that of the code, its configuration is accepted, its examples run."""

import contextlib
import dataclasses
import io
import re
import subprocess
import typing

import pytest

from runtimes.daemon.config import ServeConfig, load
from tests.conftest import ROOT
from tests.runtimes.daemon.conftest import process

PAGE = ROOT / "docs" / "jobs" / "serve.md"


def settings() -> str:
    """The table of all values, as it must stand between the marks."""
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for table, of in typing.get_type_hints(ServeConfig).items():
        known = typing.get_args(of)[1] if typing.get_origin(of) else of
        name = "models.NAME" if table == "models" else table
        for item in dataclasses.fields(known):
            default = "" if item.default == () else item.default
            default = str(default).lower() if isinstance(default, bool) else default
            rows.append(
                f"| `{name}.{item.name}` | {f'`{default}`' if default != '' else ''} | {item.metadata['help']} |"
            )
    return "\n".join(rows)


def test_the_table_has_every_value():
    found = re.search(r"<!-- settings: begin -->\n(.*)<!-- settings: end -->", PAGE.read_text(), re.S)
    assert found[1].strip() == settings()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)


def test_the_configuration_is_accepted(tmp_path):
    (text,) = blocks("toml")
    (tmp_path / "serve.toml").write_text(text)
    assert sorted(load(tmp_path / "serve.toml").models) == ["chat", "t2"]


@pytest.mark.examples
@pytest.mark.models
def test_the_examples_run():
    from edgekit.importers import downloads

    pytest.importorskip("openai", reason="pip install openai")
    pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    downloads.get("smollm2")
    with process("smollm2", "t2-gr", "--listen", "127.0.0.1:0") as (_, port):
        here = f"127.0.0.1:{port}"
        chat, tensors = (code.replace("127.0.0.1:8400", here) for code in blocks("python"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(chat, "serve.md", "exec"), {})
        assert re.match(r'\{"planet": "(Mars|Venus)"', printed.getvalue())
        with contextlib.redirect_stdout(printed := io.StringIO()):
            exec(compile(tensors, "serve.md", "exec"), {})
        assert printed.getvalue() == "(3, 14)\n"
        commands = [code.replace("127.0.0.1:8400", here) for code in blocks("sh") if code.startswith("curl")]
        answers = [
            subprocess.run(code, shell=True, capture_output=True, text=True, check=True).stdout for code in commands
        ]
        assert "Jupiter" in answers[0]
        assert '"light_curve"' in answers[1]
