"""Compress a model: make a job of the caller's arguments; then run its recipe, cluster to fewer bits, or search for a
recipe."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.bundle.format import GOLDEN, GRAPH, PROBABILITIES, WEIGHTS, Bundle, Manifest, with_files
from edgekit.bundle.store import refuse_to_replace
from edgekit.bundle.tensors import TensorSpec
from edgekit.bundle.zoo import folders
from edgekit.compression import metrics, states
from edgekit.compression.guard import Limits
from edgekit.compression.job import Job, Notify, ShowProgress
from edgekit.compression.recipe import Step, from_table, of_bundle, read, to_toml
from edgekit.compression.result import Result
from edgekit.compression.run import run
from edgekit.compression.trials import Constraints
from edgekit.data.dataset import checked, load, locate
from edgekit.data.live import named_arrays
from edgekit.errors import EdgekitError
from edgekit.importers.api import is_network, open_model, open_to_run
from edgekit.nn import live
from edgekit.search.ladder import narrowed
from edgekit.targets import profile
from edgekit.targets.profile import Target

if TYPE_CHECKING:
    from torch import nn

Recipe = str | Path | Sequence[Step | Mapping[str, Any] | tuple[str, Mapping[str, Any]]]


def _silent(message: str) -> None: ...


def _hidden(what: str, done: int, total: int) -> None: ...


def compress(
    model: str | Path | Bundle | nn.Module,
    *,
    data: Any = None,
    recipe: Recipe | None = None,
    auto: bool = False,
    target: str | Target | None = None,
    max_loss: float = 0.01,
    max_size: int | None = None,
    max_latency: float | None = None,
    metric: str | None = None,
    objective: str = "any",
    runtime: str = "onnxruntime",
    batches: Sequence[int] = (1, 16, 256),
    agree: Sequence[str] = (),
    seed: int = 0,
    trials: int = 40,
    output: str | Path | None = None,
    force: bool = False,
    notify: Notify = _silent,
    progress: ShowProgress = _hidden,
) -> Result:
    """Make a model smaller and faster, and keep only the passes whose results measure better.

    model: the name of a zoo's model, a path, a Bundle, or a torch network. data: a path as `edgekit compress --data`
    takes it, (inputs, labels), arrays by name, a Dataset, a torch DataLoader or Dataset of (inputs, labels), or a pair
    (training, test) of these; None for the model's own data set. Without test rows, edgekit holds out a quarter of the
    rows and tells `notify` so. Inputs are (rows, ...); labels are classes from 0, or numbers for regression.

    recipe: a TOML file, a bundle whose passes to take, or steps such as [("cluster", {"bits": 4})]; None for the recipe
    of a zoo's model. auto: search for a recipe, with `trials` trials. target: a device that decides which passes may
    run; latency is measured if the device is this machine, and else estimated. max_loss: the largest loss of quality
    against the original, in the metric's unit; max_size: bytes of the packed file; max_latency: CPU milliseconds of a
    call at the first batch size, with auto. metric: log-loss, error-rate, mean-absolute-error, changed, relative-error,
    or package.module:function of (outputs, labels), less is better; None for log-loss of probabilities, error-rate of a
    torch network with classes as labels, and otherwise relative-error. agree: other runtimes on which the result must
    be as good. output: a directory to write the bundle to.

    A torch network is used as it is now. It lives in this process only, so `Result.save` and `output` write its ONNX
    graph; a bundle that `edgekit.import_module` made with a factory remains a network.

    >>> import edgekit, numpy, torch
    >>> _ = torch.manual_seed(0)
    >>> network = torch.nn.Sequential(torch.nn.Linear(16, 128), torch.nn.ReLU(), torch.nn.Linear(128, 3))
    >>> inputs = numpy.random.default_rng(0).normal(size=(200, 16))
    >>> labels = network(torch.tensor(inputs, dtype=torch.float32)).argmax(1)
    >>> steps = [("cluster", {"bits": 5, "epochs": 0})]
    >>> limits = {"max_loss": 0.2, "objective": "size", "batches": (1,)}
    >>> result = edgekit.compress(network, data=(inputs, labels), recipe=steps, runtime="torch", **limits)
    >>> result.packed_bytes < 0.5 * result.source_packed_bytes
    True

    Raises EdgekitError for a mistake in the arguments, if nothing keeps to max_size or max_latency, and if the result
    does not fit the target's memory. A pass that fails is no error: the guard rolls it back, and its record gives the
    reason.
    """
    if output is not None:
        prepare(Path(output), force=force)
    job = job_of(
        model,
        data=data,
        recipe=recipe,
        auto=auto,
        target=target,
        max_loss=max_loss,
        metric=metric,
        objective=objective,
        runtime=runtime,
        batches=batches,
        agree=agree,
        seed=seed,
        notify=notify,
    )
    constraints = Constraints(max_loss, max_size, max_latency)
    result = carry_out(job, constraints, auto=auto, trials=trials, notify=notify, progress=progress)
    if output is not None:
        result = replace(result, bundle=result.save(output, force=force))
    return result


def prepare(output: Path, *, force: bool) -> None:
    """Raise before the work starts if the result could not be written."""
    refuse_to_replace(output, force)
    output.parent.mkdir(parents=True, exist_ok=True)


def job_of(
    model: str | Path | Bundle | nn.Module,
    *,
    data: Any = None,
    recipe: Recipe | None = None,
    auto: bool = False,
    replay: str | Path | None = None,
    target: str | Target | None = None,
    max_loss: float = 0.01,
    metric: str | None = None,
    objective: str = "any",
    runtime: str = "onnxruntime",
    batches: Sequence[int] = (1, 16, 256),
    agree: Sequence[str] = (),
    seed: int = 0,
    notify: Notify = _silent,
) -> Job:
    """Return the job: what to compress, and by which measure. The arguments are those of `compress`. replay: a bundle
    whose kept passes run again, with its seeds."""
    if not 0 <= max_loss < math.inf:
        raise EdgekitError(f"max_loss = {max_loss}; expected a finite number from 0")
    chosen = profile.find(target) if isinstance(target, str) else target
    limits = Limits(max_loss=max_loss, batches=tuple(batches), objective=objective)  # type: ignore[arg-type]
    source, given = _source(model, data, seed, notify)
    steps, seed = _recipe(source, recipe, auto, replay, seed)
    name = metric or default_metric(source.manifest, given)
    labelled = metrics.metric(name).labelled
    if isinstance(given, (str, Path)) or given is None:
        path = locate(source.manifest, None if given is None else str(given))
        train, test = load(path, source.manifest, labelled=labelled)
    else:
        train, test = checked(given, source.manifest, labelled=labelled)
    others = tuple(dict.fromkeys(other for other in agree if other not in ("", runtime)))
    job = Job(source, steps, train, test, limits, name, runtime, seed, chosen, others, replay=replay is not None)
    if job.estimated and chosen is not None:
        notify(f"{chosen.name} is not this machine: latency is estimated from its data sheet, quality is measured here")
    return job


def carry_out(
    job: Job,
    constraints: Constraints,
    *,
    auto: bool = False,
    trials: int = 40,
    notify: Notify = _silent,
    progress: ShowProgress = _hidden,
) -> Result:
    """Run the job's recipe, or search for one; then cluster to fewer bits until the packed file fits."""
    if constraints.max_size is not None and constraints.max_size <= 0:
        raise EdgekitError(f"max_size = {constraints.max_size}; expected bytes, more than 0")
    if constraints.max_latency is not None and not auto:
        raise EdgekitError("max_latency is for a search; pass auto=True too")
    with _work(job) as work:
        if auto:
            from edgekit.search.auto import search

            result = search(job, constraints, work, trials=trials, notify=notify, progress=progress)
            toml = to_toml(of_bundle(result.bundle)).encode()
            result = replace(result, bundle=with_files(result.bundle, {"recipe.toml": toml}))
        else:
            result = run(job, work, notify=notify, progress=progress)
            if constraints.max_size is not None:
                result = narrowed(job, result, constraints.max_size, work, notify=notify, progress=progress)
        states.prune(work)
    if not result.summary.fits:
        raise EdgekitError(
            f"the result does not fit on {job.target.name if job.target else ''} at batch size "
            f"{result.summary.memory_batch}: {result.memory}; declare smaller --batch sizes, or compress further. "
            "Nothing was written"
        )
    return result


def check_replay(result: Result, original: Bundle) -> None:
    """Raise unless the passes gave the same bytes as when the original was made."""
    if any(result.bundle.contents.get(name) != original.contents.get(name) for name in (WEIGHTS, GRAPH, GOLDEN)):
        raise EdgekitError(
            f"the replay gave other bytes than {original.path or original.manifest.name}; versions then: "
            f"{original.manifest.versions}, now: {result.bundle.manifest.versions}; check that the data and the number "
            "of threads are the same, too"
        )


def default_metric(manifest: Manifest, given: Any = None) -> str:
    """Return the metric of a model for which the caller named none: log-loss for probabilities, and the error rate for
    a live network with classes as labels. Other outputs can only be compared with the original's."""
    if manifest.outputs[0].name == PROBABILITIES:
        return "log-loss"
    if isinstance(given, Mapping) and live.is_live(manifest.arguments.get("factory")) and "labels" in given:
        labels = np.asarray(given["labels"])
        if labels.ndim == 1 and labels.dtype.kind in "iu" and len(manifest.outputs[0].shape) == 2:
            return "error-rate"
    return "relative-error"


def _source(model: Any, data: Any, seed: int, notify: Notify) -> tuple[Bundle, Any]:
    """Return the model as a bundle, and its data: a path, None, or named arrays."""
    if is_network(model):
        if data is None or isinstance(data, (str, Path)):
            raise EdgekitError("a torch network needs data in memory: data=(inputs, labels), or a DataLoader")
        arrays = named_arrays(data, seed=seed, notify=notify)
        inputs = {name: array for name, array in arrays.items() if name not in ("labels", "split")}
        from edgekit.importers.live import from_network

        specs = [TensorSpec(name, ("batch", *array.shape[1:]), str(array.dtype)) for name, array in inputs.items()]
        golden = {name: array[:8] for name, array in inputs.items()}
        return from_network(model, inputs=specs, outputs=["output"], golden=golden), arrays
    source = open_to_run(model)
    if data is None or isinstance(data, (str, Path)):
        return source, data
    names = [spec.name for spec in source.manifest.inputs]
    return source, named_arrays(data, names, seed=seed, notify=notify)


def _recipe(
    source: Bundle, recipe: Recipe | None, auto: bool, replay: str | Path | None, seed: int
) -> tuple[list[Step], int]:
    """Return the steps to run, and the seed."""
    if replay is not None:
        before = open_model(replay)
        if before.manifest.parent != source.digest:
            raise EdgekitError(
                f"{replay} was made from {(before.manifest.parent or 'no bundle')[:12]}, "
                f"{source.path or source.manifest.name} is {source.digest[:12]}; replay it on the bundle that it was "
                "made from (edgekit inspect --lineage)"
            )
        return of_bundle(before), before.manifest.seed or 0
    if auto:
        if recipe is not None:
            raise EdgekitError("auto finds a recipe of its own; leave recipe out")
        return [], seed
    if recipe is None:
        recipe = folders().get(source.manifest.name, Path()) / "recipe.toml"
        if not recipe.is_file():
            raise EdgekitError(f"{source.manifest.name} has no recipe of its own; pass --recipe FILE")
    if isinstance(recipe, (str, Path)):
        return read(recipe), seed
    steps = [_step(item) for item in recipe]
    for step in steps:
        step.build()
    return steps, seed


def _step(item: Step | Mapping[str, Any] | tuple[str, Mapping[str, Any]]) -> Step:
    if isinstance(item, Step):
        return item
    if isinstance(item, Mapping):
        return from_table(item)
    name, parameters = item
    return Step(name, parameters)


@contextlib.contextmanager
def _work(job: Job) -> Iterator[Path]:
    """Open the folder of states: that of the cache, or an empty one. A replay needs an empty folder because it must
    compute everything again, and a live network because its name stands for another network in another process."""
    if job.replay or live.is_live(job.source.manifest.arguments.get("factory")):
        with tempfile.TemporaryDirectory(prefix="edgekit-states-") as folder:
            yield Path(folder)
    else:
        yield states.folder()
