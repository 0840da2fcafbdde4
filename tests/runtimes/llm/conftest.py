"""Small language models, and engines that run them."""

import shutil

import pytest

from edgekit.importers.gguf import read_gguf
from runtimes.llm.architecture import from_gguf
from tests.gguf_files import toy_model

compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here: apt-get install gcc"
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A function that returns a small model. Its weights do not depend on the order of the tests."""
    made = {}

    def find(family="llama", form="Q4_0", **options):
        key = (family, form, *sorted(options.items()))
        if key not in made:
            path = toy_model(tmp_path_factory.mktemp("models"), family, form, **options)
            made[key] = from_gguf(read_gguf(path))
        return made[key]

    return find
