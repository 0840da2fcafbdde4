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
    """A function that returns a small model."""
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def find(family="llama", form="Q4_0", **options):
        key = (family, form, *sorted(options.items()))
        if key not in made:
            made[key] = from_gguf(read_gguf(toy_model(folder, family, form, seed=len(made), **options)))
        return made[key]

    return find
