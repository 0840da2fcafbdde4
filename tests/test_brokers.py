"""What all brokers that we start have in common."""

import sys

import pytest

from edgekit.errors import EdgekitError
from tests.brokers import Process


def test_a_server_has_a_command():
    with pytest.raises(TypeError, match="command"):
        Process()


def test_a_server_that_does_not_start_is_said():
    class Ends(Process):
        def command(self):
            return [sys.executable, "-c", ""]

    with pytest.raises(EdgekitError, match="does not answer on 127"), Ends():
        pass
