"""A small study: where in a picture is the bright square?"""

from pathlib import Path

import numpy as np

SPEC = """
[space]
image = 16
channels = 1
classes = 4
stem = ["conv3x2", "patch4"]
width = [8, 16]
head_dim = [4]
mask_unit = [2]
depths = [[1, 2], [1]]
ratios = [[1, 2], [1]]
kinds = [["rep", "separable", "window"], ["window", "global"]]
pools = [[true]]
[limits]
macs = 3e5
[search]
candidates = 6
generation = 3
[score]
data = "DATA"
epochs = [1, 3]
keep = [2]
seeds = 2
"""


def write(folder: Path) -> Path:
    """Write the rows and the spec; return the spec's path."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(0, 1, (240, 1, 16, 16)).astype(np.float32), np.arange(240) % 4
    for image, label in zip(images, labels, strict=True):
        row, column = (8 * part + rng.integers(1, 5) for part in divmod(int(label), 2))
        image[0, row : row + 3, column : column + 3] += 3
    split = (np.arange(240) % 6 == 5).astype(np.int64)
    np.savez(folder / "rows.npz", image=images, labels=labels, split=split)
    path = folder / "spec.toml"
    path.write_text(SPEC.replace("DATA", str(folder / "rows.npz")))
    return path
