"""Open the models of a consumer."""

from __future__ import annotations

import functools
from collections.abc import Callable

from alert_broker import gaussian_process
from alert_broker.classify import Classifiers, load_kernels
from alert_broker.cutouts.scorer import CutoutScorer
from alert_broker.priors import Prior
from alert_broker.stream.config import Config
from alert_broker.stream.reuse import COLUMNS, Reuse
from alert_broker.work_budget import Budget
from edgekit.bundle.format import Bundle


def open_classifiers(
    config: Config, bundle: Bundle | None, budget: Budget | None = None, cutouts: Bundle | None = None
) -> Classifiers:
    """Return the classifiers, whose models are opened when they are needed. If the configuration says so, each reuses
    its last classification of an object. cutouts: the model that scores the images, which is opened now; a score is
    never reused, because every alert has images of its own."""
    same, prior = config.model.reuse, Prior.named(config.model.prior)
    threads = config.model.threads or max(1, gaussian_process.cores() - 1)  # the other stages and the client need one
    scorer = CutoutScorer(cutouts, config.cutouts.runtime, threads=threads) if cutouts else None
    open_them = functools.partial(
        Classifiers, bundle, config.model.runtime, threads=threads, budget=budget, prior=prior, cutouts=scorer
    )
    return open_them() if same == "off" else open_them(wrap=functools.partial(Reuse, same=same), columns=COLUMNS)


def open_all_classifiers(config: Config, budget: Budget, notify: Callable[[str], None]) -> Classifiers:
    """Open the models of all surveys now, and run each of them once, so that the first alert need not wait. notify: is
    called with a line for the user if kernels must be compiled."""
    from edgekit.importers.files import resolve
    from edgekit.importers.onnx import try_out

    names = (config.model.bundle, config.cutouts.model)
    bundle, cutouts = (try_out(resolve(name)) if name else None for name in names)
    classifiers = open_classifiers(config, bundle, budget, cutouts)
    load_kernels(notify)
    classifiers.open_all()
    for item in classifiers.opened.values():
        item.session.warmup(config.batch.size)
    if classifiers.cutouts is not None:
        classifiers.cutouts.warm_up()
    return classifiers
