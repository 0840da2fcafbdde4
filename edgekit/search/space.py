"""The space of recipes that `--auto` may suggest: fewer units and blocks, then codes for the weights or another
form of the graph. The space depends on the model, the runtime and the target, and is determined once, before the
first trial."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from edgekit.bundle.family import countable_units
from edgekit.compression.decisions import allowed, rounded
from edgekit.compression.job import Job
from edgekit.compression.recipe import Step
from edgekit.compression.subject import candidate_of, lowered
from edgekit.compression.trials import Sensitivity
from edgekit.data.dataset import is_labelled
from edgekit.errors import EdgekitError
from edgekit.passes.base import Candidate

if TYPE_CHECKING:
    import optuna

SPACE = 4  # the version of what a study stores: only the version that began a study resumes it
# Epochs of recovery, in trials and in the final run.
SHORT = {"structured_prune": 2, "dependency_prune": 2, "remove_layers": 2, "cluster": 1, "quantize": 1, "qat_int8": 1}
FULL = {"structured_prune": 8, "dependency_prune": 8, "remove_layers": 8, "cluster": 2, "quantize": 2, "qat_int8": 3}
REMOVED = (0.0, 0.25, 0.375, 0.5, 0.625)  # shares of the units to remove
BLOCKS = (0.0, 0.25, 0.5)  # shares of the blocks to remove
APART = (-0.125, 0.0, 0.125)  # the difference of the first type of units, if a family counts several types
EVEN, RANKED, SPARED = "even", "ranked", "spared"  # how the groups share the removed units
MOST_EXEMPT, MOST_WIDER = 4, 2
PLAIN: dict[str, Any] = {
    "exempt": 0, "removed": 0.0, "blocks": 0.0, "apart": 0.0, "shares": EVEN, "wider": 0, "smoothed": False,
}  # fmt: skip
CODES, INT8 = ("cluster", "quantize"), ("dynamic_int8", "static_int8")


@dataclass(frozen=True, slots=True)
class Space:
    """The space of one job. ranked: weights, the most sensitive first; smooth: whether `smooth_quant` finds anything to
    balance; groups: those from which `dependency_prune` removes units, the most sensitive first; stack: the container
    of most blocks, and how many of them can be removed."""

    job: Job
    ranked: tuple[Sensitivity, ...] = ()
    smooth: bool = False
    groups: tuple[str, ...] = ()
    stack: tuple[str, int] = ("", 0)


def explored(job: Job, ranked: tuple[Sensitivity, ...]) -> Space:
    """Explore the space of this job."""
    groups, stack = _structure(job)

    def change(group: str) -> float:
        return max([item.change for item in ranked if item.name.startswith(f"{group}.")], default=0.0)

    return Space(job, ranked, smoothable(job), tuple(sorted(groups, key=change, reverse=True)), stack)


def suggest(trial: optuna.trial.BaseTrial, space: Space) -> tuple[Step, ...]:
    """Suggest a recipe with short recoveries. The most sensitive weights stay as they are if the trial exempts them."""
    job, names = space.job, [item.name for item in space.ranked]
    steps = [] if job.source.is_graph else _smaller(trial, space)
    count = trial.suggest_int("exempt", 0, min(MOST_EXEMPT, max(0, len(names) - 1)))
    # The remaining blocks get new numbers when others are removed, so their weights have other names.
    renamed = any(step.name == "remove_layers" for step in steps)
    exempt = [] if renamed else list(space.ranked[:count])
    nodes = [node for item in exempt for node in item.nodes]
    form = trial.suggest_categorical("form", forms(job))
    if form in CODES:
        steps += _codes(trial, form, [] if renamed else names, len(exempt))
    elif form in INT8:
        if space.smooth and trial.suggest_categorical("smoothed", [False, True]):
            steps.append(Step("smooth_quant", {}))
        steps.append(Step(form, {"exclude": nodes} if nodes else {}))
    elif form == "qat_int8":
        spared = {"include": names[len(exempt) :]} if exempt else {}
        steps.append(Step(form, {"epochs": SHORT[form], **spared}))
    elif form == "low_rank":
        steps.append(Step(form, {"energy": trial.suggest_categorical("energy", [0.9, 0.95, 0.99])}))
        if "dynamic_int8" in forms(job) and trial.suggest_categorical("low_rank int8", [False, True]):
            steps.append(Step("dynamic_int8", {}))
    elif form == "weight_only":
        widths = [bits for bits in (8, 4) if allowed(job.target, Step(form, {"bits": bits}))]
        steps.append(Step(form, {"bits": trial.suggest_categorical("weight_only bits", widths)}))
    elif form == "half":
        steps.append(_half(job))
    elif form == "sparsify":
        steps += [Step(form, {"pattern": "2:4"}), _half(job)]
    return tuple(steps)


def forms(job: Job) -> list[str]:
    """Return the forms that the weights or the graph may take, among those that the target allows."""
    found = ["float32"] if job.source.is_graph else ["float32", *CODES]
    if job.source.is_graph or job.runtime == "onnxruntime":  # other runtimes run networks only
        found += [*INT8, "weight_only"] if job.source.is_graph else ["dynamic_int8"]
        found += ["half", "low_rank"]
    if "dynamic_int8" in found and not job.source.is_graph and (job.target is None or job.target.plan.int8 != "none"):
        found += ["static_int8"] + ["qat_int8"] * bool(find_spec("torchao"))
    if "half" in found and _has_sparse_units(job):
        found.append("sparsify")
    steps = {"half": [_half(job)], "weight_only": [Step("weight_only", {"bits": bits}) for bits in (8, 4)]}
    plain = ("float32", *CODES, "sparsify")
    return [
        form
        for form in found
        if form in plain or any(allowed(job.target, step) for step in steps.get(form, [Step(form, {})]))
    ]


def starts(space: Space) -> list[dict[str, Any]]:
    """Return recipes that an expert would try first, so that a short search is no worse than they are."""
    job = space.job
    small: dict[str, Any] = {"form": "cluster", "cluster bits": 5}
    found: list[dict[str, Any]]
    if job.target is not None:
        found = [{"form": form} for form in ("half", "static_int8", "dynamic_int8") if form in forms(job)]
        found += [] if job.source.is_graph else [{**small, "removed": 0.375}]
    elif job.source.is_graph:
        found = [{"form": "dynamic_int8"}, {"form": "weight_only", "weight_only bits": 8}]
    elif job.runtime != "onnxruntime":
        found = [{**small, "removed": removed} for removed in (0.375, 0.5)]
    else:
        int8: dict[str, Any] = {"form": "dynamic_int8"}
        found = [int8, {**int8, "removed": 0.5}]
        found += [{**int8, "removed": 0.5, "blocks": 0.25}] if space.stack[1] else [{**int8, "removed": 0.625}]
        # codes reduce the size only
        found += [{**small, "removed": 0.375}] if job.limits.objective != "latency" else []
    return [{**PLAIN, **start} for start in found]


def lengthened(step: Step, factor: float | None = None) -> Step:
    """Return the step with `factor` times the recovery of trials; without a factor, with at least the recovery of a
    final run."""
    epochs = step.parameters.get("epochs")
    if not epochs:
        return step
    longer = max(epochs, FULL[step.name] if factor is None else round(factor * SHORT[step.name]))
    return replace(step, parameters={**step.parameters, "epochs": longer})


def smoothable(job: Job) -> bool:
    """Return whether `smooth_quant` finds a product right after a normalization; a network that adds before each
    product has none."""
    if not job.source.is_graph and job.runtime != "onnxruntime":
        return False
    try:
        Step("smooth_quant", {}).build().plan(lowered(candidate_of(job.source), job))
    except EdgekitError:
        return False
    return True


def _smaller(trial: optuna.trial.BaseTrial, space: Space) -> list[Step]:
    """Suggest structured pruning, with the parameters of the family, and then fewer blocks: it is faster to look for
    blocks in a pruned network."""
    job, steps = space.job, []
    removed = float(trial.suggest_categorical("removed", list(REMOVED)))
    units = countable_units(job.source.manifest.family, job.source.model())
    if units and removed:
        apart = float(trial.suggest_categorical("apart", list(APART))) if len(units) > 1 else 0.0
        shares = {name: removed + apart * (number == 0) for number, name in enumerate(units)}
        keep = {
            name: rounded(job.target, max(1, round(size * (1 - shares[name]))), size) for name, size in units.items()
        }
        steps.append(_recovered("structured_prune", keep=keep))
    elif removed:
        # without labels there is no loss whose gradient Taylor importance needs
        importance = "taylor" if is_labelled(job.train) else "magnitude"
        shares_of = trial.suggest_categorical("shares", [EVEN, RANKED, SPARED]) if len(space.groups) > 1 else EVEN
        own: dict[str, Any] = {"global_ranking": True} if shares_of == RANKED else {}
        if shares_of == SPARED:  # the more sensitive quarter loses half as much
            own = {"layers": dict.fromkeys(space.groups[: -(-len(space.groups) // 4)], removed / 2)}
        steps.append(_recovered("dependency_prune", sparsity=removed, importance=importance, **own))
    path, count = space.stack
    if count:
        share = float(trial.suggest_categorical("blocks", list(BLOCKS)))
        steps += [_recovered("remove_layers", count=round(share * count), blocks=path)] if share else []
    return steps


def _recovered(name: str, **parameters: Any) -> Step:
    return Step(name, {**parameters, "epochs": SHORT[name]})


def _codes(trial: optuna.trial.BaseTrial, form: str, names: list[str], exempt: int) -> list[Step]:
    """Suggest few bits for most weights, one or two more for the more sensitive half, and 8 for exempt weights. names:
    the most sensitive first; empty if they are unknown, and then all weights get one width."""
    bits = trial.suggest_int(f"{form} bits", 3, 8)
    if not names:
        return [_recovered(form, bits=bits)]
    wider = min(8, bits + trial.suggest_int("wider", 0, MOST_WIDER))
    coded = names[exempt:]
    half = len(coded) // 2 if wider > bits else 0
    steps = [_recovered(form, bits=bits, include=coded[half:])]
    steps += [_recovered(form, bits=wider, include=coded[:half])] if half else []
    if exempt and bits < 8:
        steps.append(Step("quantize", {"bits": 8, "epochs": 0, "include": names[:exempt]}))
    return steps


def _half(job: Job) -> Step:
    """Return the step for half precision: of weights alone, which a CPU folds, or of arithmetic too, on devices that
    are made for it."""
    target = job.target
    arithmetic = target is not None and target.kind != "cpu" and "float16" in target.plan.order
    return Step("half", {} if arithmetic else {"storage": True})


def _has_sparse_units(job: Job) -> bool:
    """Return whether 2:4 sparsity can pay: only on a device that multiplies it in half the time and that is this
    machine. An estimate counts every product, so it would see only the loss of sparsity."""
    target = job.target
    return (
        target is not None
        and not job.estimated
        and "float16" in target.rates
        and target.rates["float16"].sparse is not None
    )


def _structure(job: Job) -> tuple[list[str], tuple[str, int]]:
    """Return the groups of units, and the stack of most blocks, of a network that a Python function builds."""
    from edgekit.passes.dependency_prune import DependencyPrune
    from edgekit.passes.remove_layers import stacks

    candidate = None if job.source.is_graph else candidate_of(job.source)
    if not isinstance(candidate, Candidate) or candidate.family != "module":
        return [], ("", 0)
    groups = DependencyPrune(sparsity=0.5).groups(candidate)
    able = {path: len(found) for path, found in stacks(candidate).items() if len(found) >= 1 / min(BLOCKS[1:])}
    path = max(able, key=lambda name: able[name], default="")
    return groups, (path, able.get(path, 0))
