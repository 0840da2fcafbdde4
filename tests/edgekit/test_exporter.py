"""The contract of exporters: options that an export takes, and classes that are none, each with its reason."""

from dataclasses import dataclass

import pytest

from edgekit import exporter, plugins
from edgekit.errors import EdgekitError
from edgekit.exporter import Export, Exporter, export, load_exporter, option_names, problem_with


@dataclass(frozen=True)
class Text:
    """Writes a file with its options."""

    title: str = "plain"
    target: str | None = None

    def export(self, bundle, directory, *, force=False):
        said = {"title": self.title, "target": self.target, "model": bundle.manifest.name, "force": force}
        return Export(directory, {"title.txt": len(self.title)}, said, [])

    @classmethod
    def accepts(cls, model, target, stack):
        return ""


@pytest.fixture
def text(register):
    register("edgekit.exporters", "text", Text)


def test_options_and_target_reach_the_exporter(text, tiny_bundle):
    found = export(tiny_bundle, "out", to="text", options={"title": "é"}, target="tesla-p40", force=True)
    assert found.manifest == {"title": "é", "target": "tesla-p40", "model": "tiny", "force": True}
    plain = export(tiny_bundle, "out", to="text").manifest
    assert plain == {"title": "plain", "target": None, "model": "tiny", "force": False}


def test_two_targets_contradict_each_other(text, tiny_bundle):
    options = {"target": "jetson-nano"}
    assert (
        export(tiny_bundle, "out", to="text", options=options, target="jetson-nano").manifest["target"] == "jetson-nano"
    )
    with pytest.raises(EdgekitError, match=r"the options say .jetson-nano.; give the target once"):
        export(tiny_bundle, "out", to="text", options=options, target="tesla-p40")
    assert options == {"target": "jetson-nano"}


def test_an_option_that_the_format_does_not_take_is_named(text, tiny_bundle):
    with pytest.raises(EdgekitError, match=r"option 'titel'.*the format text.*did you mean 'title'"):
        export(tiny_bundle, "out", to="text", options={"titel": "x"})


def test_a_target_for_a_format_without_targets_is_an_option_it_does_not_take(register, tiny_bundle):
    @dataclass(frozen=True)
    class Untargeted(Text):
        target = None

    Untargeted.__dataclass_fields__.pop("target")
    register("edgekit.exporters", "untargeted", Untargeted)
    with pytest.raises(EdgekitError, match="option 'target'"):
        export(tiny_bundle, "out", to="untargeted", target="tesla-p40")


def test_an_unknown_format_names_the_known_ones(tiny_bundle):
    with pytest.raises(EdgekitError, match=r"export format 'onxn'.*did you mean 'onnx'"):
        export(tiny_bundle, "out", to="onxn")


@pytest.mark.parametrize("name", plugins.names("edgekit.exporters"))
def test_the_installed_formats_keep_the_contract(name):
    exporter_class = load_exporter(name)
    assert problem_with(exporter_class, name) == ""
    assert issubclass(exporter_class, Exporter)
    assert option_names(exporter_class) == set(exporter_class.__dataclass_fields__)


def plain():
    class Plain:
        export, accepts = Text.export, Text.accepts

    return Plain


def without(method):
    body = {name: getattr(Text, name) for name in ("export", "accepts") if name != method}
    return dataclass(frozen=True)(type("Without", (), body))


def exporting(method):
    return dataclass(frozen=True)(type("Other", (), {"export": method, "accepts": Text.accepts}))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (None, "it is not a dataclass of options"),
        (Text(), "it is not a dataclass of options"),
        (plain(), "it is not a dataclass of options"),
        (without("export"), "it has no method 'export'"),
        (without("accepts"), "it has no method 'accepts'"),
        (
            exporting(lambda self, bundle, directory: None),
            r"export is called with \(bundle, directory, force=...\), and",
        ),
        (exporting(lambda self, bundle, to, more, force=False: None), "missing a required argument: 'more'"),
    ],
)
def test_what_is_no_exporter_is_refused_with_the_reason(wrong, reason, register):
    register("edgekit.exporters", "wrong", wrong)
    with pytest.raises(EdgekitError, match=f"the export format 'wrong' cannot be used: .*{reason}"):
        load_exporter("wrong")


def test_more_than_the_contract_asks_for_is_no_problem():
    assert problem_with(exporting(lambda self, bundle, directory, *, force=False, more=None: None), "x") == ""
    assert problem_with(exporting(lambda *given, **options: None), "x") == ""


def test_an_exporter_that_says_nothing_about_parsers_has_none():
    assert exporter.Exporter.accepts.__func__(Text, None, None, None) == ""
