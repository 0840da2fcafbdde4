"""Class shares by which probabilities are weighted: a model that was trained with equal shares answers for another
population if its probabilities are multiplied by that population's shares and normalized.

Bayes' rule with equal shares in the training; the likelihoods stay as the model gives them.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, unknown

UNIFORM = "uniform"
# Shares of the sources that a survey detects. lsst: three years, as PLAsTiCC simulates them (Kessler+ 2019, table 1,
# the challenge's test set, which is not weighted by alerts).
SHARES: Mapping[str, Mapping[str, float]] = {
    "lsst": {
        "mu-Lens": 1_303, "TDE": 13_555, "EB": 96_572, "SNII": 1_000_150, "SNIax": 63_664, "Mira": 1_453,
        "SNIbc": 175_094, "KN": 131, "M-dwarf": 93_494, "SNIa-91bg": 40_193, "AGN": 101_424, "SNIa": 1_659_831,
        "RRL": 197_155, "SLSN-I": 35_782,
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prior:
    """name: as it is recorded with the results; shares: by class, positive, of any sum; empty for equal shares."""

    name: str
    shares: Mapping[str, float]

    @classmethod
    def named(cls, text: str) -> Prior:
        """Return the prior `uniform`, a survey's, or that of a TOML file of CLASS = SHARE."""
        if text == UNIFORM:
            return cls(UNIFORM, {})
        if text in SHARES:
            return cls(text, SHARES[text])
        path = Path(text)
        if path.suffix != ".toml":
            raise unknown("prior", text, [UNIFORM, *SHARES, "FILE.toml"])
        return cls(text, _read(path))

    def weights(self, classes: Sequence[str], source: str) -> npt.NDArray[np.float64] | None:
        """Return (classes,) weights of a model's classes, whose mean is 1; None for equal shares. Raises EdgekitError
        if the prior does not name exactly these classes."""
        if not self.shares:
            return None
        for name in self.shares:
            if name not in classes:
                raise unknown("class", name, classes, where=f"prior {self.name}")
        if missing := [name for name in classes if name not in self.shares]:
            raise EdgekitError(
                f"prior {self.name} has no share for {missing[0]}, which {source} tells apart; give every class a share"
            )
        shares = np.array([self.shares[name] for name in classes], dtype=np.float64)
        return np.asarray(shares / shares.mean())


def weigh(probabilities: npt.NDArray[np.float32], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return (rows, classes) probabilities under the weights. A row that is zero in every class stays so."""
    product = probabilities * weights
    total = product.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(product, total, out=product, where=total > 0)).astype(np.float32)


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise EdgekitError(f"{path} does not exist; expected a TOML file of lines such as SNIa = 0.4")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise EdgekitError(f"{path} is not TOML: {error}; expected lines such as SNIa = 0.4") from None
    if not found:
        raise EdgekitError(f"{path} names no class; expected lines such as SNIa = 0.4")
    for name, share in found.items():
        if type(share) not in (int, float) or not 0 < share < math.inf:
            raise EdgekitError(f"{path}: {name} = {str(share)[:40]}; expected a share above 0")
    return {name: float(share) for name, share in found.items()}
