"""The language model that tests of the runtimes share."""

import pytest

from edgekit.errors import EdgekitError
from edgekit.importers import downloads


@pytest.fixture(scope="session")
def smollm2_file():
    """The file of SmolLM2 135M Instruct, which is downloaded once."""
    try:
        return downloads.get("smollm2")
    except EdgekitError as error:
        pytest.skip(f"the model cannot be downloaded: {error}")
