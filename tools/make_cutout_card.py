"""Write the card of cutout-rb, models/cutout-rb/README.md, from the scores of the held-out triplets, the facts of the
training (both written by tools/train_cutout_rb.py) and the measured times (tools/bench_cutout_rb.py).

    python tools/make_cutout_card.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle.format import Bundle
from edgekit.bundle.store import open_bundle
from edgekit.errors import EdgekitError

try:
    from cutout_quality import VERDICT, Agreement, agreement
except ModuleNotFoundError:  # imported by a test
    from tools.cutout_quality import VERDICT, Agreement, agreement

ROOT = Path(__file__).resolve().parents[1]
MODEL, TIMES = ROOT / "models" / "cutout-rb", ROOT / "benchmarks" / "cutout_rb.json"
BAR = 0.97  # agreement that we aimed at

CARD = """\
# cutout-rb

This model tells real sources from artefacts in the three images of a ZTF alert. It gives the column `drb`, like
braai, the network that ZTF runs (Duev et al. 2019, arXiv 1907.11259), and it was trained to give braai's answers in a
fraction of braai's time. It has {parameters:,} parameters and looks at the central {side} of {size} pixels.

## Quality

The reference is the `drb` that {rows} real alerts carry; it is the output of braai's weights d6_m7. Each alert was
scored by a network that saw no image of its object. At {verdict} or above, a source counts as real.

| on the same {rows} alerts | cutout-rb, held-out objects | braai with the weights d6_m9 |
|---|---|---|
{table}

The brackets are 95 % Wilson intervals. {verdicts}

[held_out.csv](held_out.csv) has the scores behind the table. The weights in this folder were trained on all {rows}
alerts, so no number of the table is theirs. We chose the size of the central part, the head and the amount of
training after a look at the held-out objects of one fold, so the numbers are slightly optimistic.

What limits the agreement is most likely the training: it has the triplets of few objects, and it was short. The
loss was still falling in the last of {epochs} epochs.

## What these numbers show, and what they do not

The labels were made by another network. Nobody has looked at these alerts and said which are real. So the table shows
how well cutout-rb imitates d6_m7, and not how often it is right. Where d6_m7 is wrong, the network is rewarded for
the same mistake, and a better answer counts as an error. d6_m9 is another version by the same authors;
where it differs from d6_m7, it may well be right. The column shows how far two networks for
the same job differ.

{low} alerts below {verdict} are few: one verdict is {one:.1%} of them, and the intervals are wide. These alerts were
published by brokers or chosen for tests of their software, so they are neither a random night nor its share of
artefacts. Rubin's and other surveys' images have never been tested.

## Intended use

Use `drb` of this model to sort alerts where braai is too slow, or beside it. ZTF's packets carry braai's own `drb`:
for those, use that.

    edgekit alerts classify night/ -o night.parquet --cutouts cutout-rb

The preprocessing is part of the bundle: NaN becomes 0, and each row of an image is divided by its L2 norm.

## Speed

Both networks ran in float32 in ONNX Runtime on one thread, in turns, each with the graph optimizations that are fastest
for it (`benchmarks/cutout_rb.json`). Times are microseconds of CPU time for each alert. We aimed at 10 times
faster{reached}.

| batch | braai, float32 | cutout-rb | times faster [95 % interval] |
|---|---|---|---|
{times}

## How it was made

`edgekit search` chose stem and pooling among six networks (`tools/cutout_rb.toml`, study `{study}`); the head, which
has weights for each position instead of a mean over all, is ours and was not searched. The best after
one short training each was taken. Its lead over the second is smaller than such a training can tell apart, and the
study's last rung (more epochs and seeds) was not finished. The rows of the search were
simulated alerts alone: no real object took part in the choice. The network was then trained by distillation: {copies}
changed copies of each real triplet ({more} of those below {verdict}) and {simulated:,} simulated triplets, each in
{variants} variants, got their soft labels from d6_m7. The changes are turns, mirror images, sub-pixel shifts, noise,
seeing, fainter and brighter sources, injected stars, dipoles, hot pixels, streaks, bad columns, saturation, badly
matched profiles, pixels without a value, and sums with other triplets of the same fold (`tools/augment_cutouts.py`).

    python tools/train_cutout_rb.py DATA
    python tools/bench_cutout_rb.py DATA/weights_d6_m7.npz --json benchmarks/cutout_rb.json
    python tools/make_cutout_card.py

| | |
|---|---|
| seed | {seed} |
| epochs | {epochs} ([training_log.csv](training_log.csv): training loss by epoch) |
| cross-validation | {folds} folds, by object |
| CPU seconds | {seconds} |
| versions | {versions} |
| machine | {machine} |
| bundle | SHA-256 `{digest}` |

Data: ZTF public alerts (NSF, Caltech/IPAC); no image of them is part of this model. Teacher: braai's published
weights, MIT licence; they are not part of this model. Weights: this project's, Apache-2.0.
"""


def read_scores(path: Path) -> dict[str, Any]:
    """Return the columns of held_out.csv."""
    rows = np.genfromtxt(path, delimiter=",", names=True)
    return {name: rows[name] for name in rows.dtype.names}


def verdict_of(ours: Agreement, other: Agreement) -> str:
    """Say whether the two aims were reached."""
    agree = "reaches" if ours.agree.value >= BAR else "does not reach"
    lower = "is not above" if ours.false_positives.value <= other.false_positives.value else "is above"
    return (
        f"We aimed at {BAR:.0%} agreement, which cutout-rb {agree}, and at no more false positives than d6_m9 has: its "
        f"rate {lower} d6_m9's."
    )


def card(bundle: Bundle, scores: dict[str, Any], facts: dict[str, Any], times: dict[str, Any]) -> str:
    """Return the card. Raises EdgekitError if the times are those of other weights."""
    if times["digest"] != bundle.digest:
        raise EdgekitError(f"{TIMES} holds the times of other weights; run tools/bench_cutout_rb.py")
    ours, other = (agreement(scores["drb"], scores[name]) for name in ("cutout_rb", "d6_m9"))
    lines = [
        ("same verdict", ours.agree, other.agree),
        (f"missed, of those at {VERDICT} or above", ours.missed, other.missed),
        (f"false positives, of those below {VERDICT}", ours.false_positives, other.false_positives),
        ("Spearman's rank correlation", f"{ours.rank:.3f}", f"{other.rank:.3f}"),
    ]
    speeds = [
        "| {} | {:.1f} | {:.1f} | {:.1f} [{:.1f}, {:.1f}] |".format(
            batch, *item["microseconds_per_alert"], item["times_faster"], *item["interval"]
        )
        for batch, item in times["by_batch"].items()
    ]
    failed = [batch for batch, item in times["by_batch"].items() if not item["reaches_target"]]
    reached = f", which was not reached at batch {' and '.join(failed)}" if failed else ", which was reached"
    network = bundle.manifest.arguments["network"]
    return CARD.format(
        parameters=bundle.parameters, side=network["image"], size=bundle.manifest.preprocessing["size"],
        rows=ours.agree.of, verdict=VERDICT, low=ours.false_positives.of, one=1 / ours.false_positives.of,
        table="\n".join(f"| {name} | {first} | {second} |" for name, first, second in lines),
        verdicts=verdict_of(ours, other), times="\n".join(speeds), reached=reached, study=facts["study"],
        copies=facts["copies"][0], more=facts["copies"][1], simulated=facts["simulated"], variants=facts["variants"],
        seed=bundle.manifest.seed,
        epochs=facts["schedule"]["epochs"], folds=len(facts["cpu_seconds"]) - 1,
        seconds=", ".join(f"{name} {value:.0f}" for name, value in facts["cpu_seconds"].items()),
        versions=", ".join(f"{name} {value}" for name, value in bundle.manifest.versions.items()),
        machine=facts["machine"], digest=bundle.digest,
    )  # fmt: skip


def stored_card() -> str:
    """Return the card of the stored bundle, scores, facts and times."""
    facts = json.loads((MODEL / "training.json").read_text())
    return card(open_bundle(MODEL), read_scores(MODEL / "held_out.csv"), facts, json.loads(TIMES.read_text()))


if __name__ == "__main__":
    (MODEL / "README.md").write_text(stored_card())
