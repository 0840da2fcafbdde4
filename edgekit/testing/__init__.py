"""Conformance checks that a package with a pass, an exporter or a session of its own runs in its tests.

    from edgekit.testing import check_exporter, check_pass, check_session

    def test_my_pass_keeps_the_contract():
        check_pass(MyPass(strength=0.5), candidate, context)

Each check raises AssertionError with one sentence that says what the plug-in did and what the contract asks for.
"""

from edgekit.testing.exporters import check_exporter
from edgekit.testing.passes import check_pass
from edgekit.testing.sessions import check_session

__all__ = ["check_exporter", "check_pass", "check_session"]
