"""What `--auto` may suggest: fewer units and blocks, then codes for the weights or a form of the graph. What is
suggested depends on the model, the runtime and the target, and is found out once, before the first trial."""

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

SPACE = 4  # version of what a study stores: a study is resumed only by the version that began it
# Epochs of recovery, in trials and at the end.
SHORT = {"structured_prune": 2, "dependency_prune": 2, "remove_layers": 2, "cluster": 1, "quantize": 1, "qat_int8": 1}
FULL = {"structured_prune": 8, "dependency_prune": 8, "remove_layers": 8, "cluster": 2, "quantize": 2, "qat_int8": 3}
REMOVED = (0.0, 0.25, 0.375, 0.5, 0.625)  # shares of the units
BLOCKS = (0.0, 0.25, 0.5)  # and of the blocks
APART = (-0.125, 0.0, 0.125)  # how much more of the first kind of units, where a family counts several
EVEN, RANKED, SPARED = "even", "ranked", "spared"  # shares of the groups
MOST_EXEMPT, MOST_WIDER = 4, 2
PLAIN: dict[str, Any] = {
    "exempt": 0, "removed": 0.0, "blocks": 0.0, "apart": 0.0, "shares": EVEN, "wider": 0, "smoothed": False,
}  # fmt: skip
CODES, INT8 = ("cluster", "quantize"), ("dynamic_int8", "static_int8")


@dataclass(frozen=True, slots=True)
class Space:
    """ranked: weights, most sensitive first; smooth: whether `smooth_quant` has anything to balance; groups: what
    `dependency_prune` removes from, most sensitive first; stack: the container of most blocks, and how many can go."""

    job: Job
    ranked: tuple[Sensitivity, ...] = ()
    smooth: bool = False
    groups: tuple[str, ...] = ()
    stack: tuple[str, int] = ("", 0)


def explored(job: Job, ranked: tuple[Sensitivity, ...]) -> Space:
    """The space of this job."""
    groups, stack = _structure(job)

    def change(group: str) -> float:
        return max([item.change for item in ranked if item.name.startswith(f"{group}.")], default=0.0)

    return Space(job, ranked, smoothable(job), tuple(sorted(groups, key=change, reverse=True)), stack)


def suggest(trial: optuna.trial.BaseTrial, space: Space) -> tuple[Step, ...]:
    """A recipe, with short recoveries. Nothing is suggested for the most sensitive weights if they are exempt."""
    job, names = space.job, [item.name for item in space.ranked]
    steps = [] if job.source.is_graph else _smaller(trial, space)
    count = trial.suggest_int("exempt", 0, min(MOST_EXEMPT, max(0, len(names) - 1)))
    # blocks that are left take the numbers of those that went: their weights are known by other names
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
    """What may become of the weights, or of the graph: for a target, what it allows."""
    found = ["float32"] if job.source.is_graph else ["float32", *CODES]
    if job.source.is_graph or job.runtime == "onnxruntime":  # others run networks only
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
    """What an expert would try first, so that a short search is no worse than that."""
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
        found += [{**small, "removed": 0.375}] if job.limits.objective != "latency" else []  # codes are for size
    return [{**PLAIN, **start} for start in found]


def lengthened(step: Step, factor: float | None = None) -> Step:
    """The step with `factor` times the recovery that trials have; with the one that the result deserves, at least."""
    epochs = step.parameters.get("epochs")
    if not epochs:
        return step
    longer = max(epochs, FULL[step.name] if factor is None else round(factor * SHORT[step.name]))
    return replace(step, parameters={**step.parameters, "epochs": longer})


def smoothable(job: Job) -> bool:
    """Whether `smooth_quant` finds a product right after a normalization: not in networks that add before they do."""
    if not job.source.is_graph and job.runtime != "onnxruntime":
        return False
    try:
        Step("smooth_quant", {}).build().plan(lowered(candidate_of(job.source), job))
    except EdgekitError:
        return False
    return True


def _smaller(trial: optuna.trial.BaseTrial, space: Space) -> list[Step]:
    """Structured pruning, in the words of the family, then blocks: they are found sooner in what is left."""
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
        importance = "taylor" if is_labelled(job.train) else "magnitude"  # without labels no loss to be expanded
        shares_of = trial.suggest_categorical("shares", [EVEN, RANKED, SPARED]) if len(space.groups) > 1 else EVEN
        own: dict[str, Any] = {"global_ranking": True} if shares_of == RANKED else {}
        if shares_of == SPARED:  # the more sensitive quarter gives half as much
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
    """Few bits for most weights, a bit or two more for the more sensitive half, 8 for what is exempt. names: most
    sensitive first; none where they are not known, which is one width for all."""
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
    """Weights alone, which a CPU folds; or arithmetic too, on devices that are made for it."""
    target = job.target
    arithmetic = target is not None and target.kind != "cpu" and "float16" in target.plan.order
    return Step("half", {} if arithmetic else {"storage": True})


def _has_sparse_units(job: Job) -> bool:
    """Whether 2:4 can pay: on a device that multiplies it in half the time, and is here to show it. Estimates count
    every product, and would see what sparsity loses alone."""
    target = job.target
    return (
        target is not None
        and not job.estimated
        and "float16" in target.rates
        and target.rates["float16"].sparse is not None
    )


def _structure(job: Job) -> tuple[list[str], tuple[str, int]]:
    """Groups of units, and the stack of most blocks, of a network that a Python function builds."""
    from edgekit.passes.dependency_prune import DependencyPrune
    from edgekit.passes.remove_layers import stacks

    candidate = None if job.source.is_graph else candidate_of(job.source)
    if not isinstance(candidate, Candidate) or candidate.family != "module":
        return [], ("", 0)
    groups = DependencyPrune(sparsity=0.5).groups(candidate)
    able = {path: len(found) for path, found in stacks(candidate).items() if len(found) >= 1 / min(BLOCKS[1:])}
    path = max(able, key=lambda name: able[name], default="")
    return groups, (path, able.get(path, 0))
