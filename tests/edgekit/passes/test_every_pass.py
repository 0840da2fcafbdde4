"""What holds for every pass on networks. A new pass joins by one line in PASSES."""

import math
from importlib.metadata import entry_points

import numpy as np
import pytest

from edgekit.bundle.encoding import Affine
from edgekit.bundle.format import assemble
from edgekit.errors import EdgekitError
from edgekit.nn.training import probabilities
from edgekit.passes.base import Candidate, Context, Level, decoded, frozen, matrices
from edgekit.passes.cluster import Cluster
from edgekit.passes.distill import Distill
from edgekit.passes.magnitude_prune import MagnitudePrune
from edgekit.passes.qat import Qat
from edgekit.passes.quantize import Quantize
from edgekit.passes.structured_prune import StructuredPrune
from tests.edgekit.passes.test_every_module_pass import MODULE_PASSES

PASSES = {
    "structured_prune": StructuredPrune(keep={"heads": 2, "ff_dim": 8}, epochs=2),
    "magnitude_prune": MagnitudePrune(sparsity=0.5, epochs=2),
    "qat": Qat(epochs=2),
    "cluster": Cluster(bits=4, epochs=2),
    "cluster the classifier": Cluster(bits=2, epochs=2, include=("classifier.*",)),
    "quantize to 8 bits": Quantize(bits=8, epochs=2),
    "quantize the blocks to 4 bits": Quantize(bits=4, epochs=2, include=("blocks.*",)),
    "distill": Distill(student={"embed_dim": 8, "heads": 2}, epochs=2),
}
every_pass = pytest.mark.parametrize("compression", PASSES.values(), ids=PASSES)


def snapshot(candidate: Candidate) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in candidate.weights().items()}


def test_the_list_holds_every_registered_pass():
    registered = {point.load() for point in entry_points(group="edgekit.passes") if point.value.startswith("edgekit.")}
    networks = {kind for kind in registered if kind.level != Level.GRAPH}
    networks -= {kind for kind in networks if getattr(kind, "lowers", False)}  # they leave a graph: test_qat_int8.py
    assert networks == {type(item) for item in (*PASSES.values(), *MODULE_PASSES.values())}


@every_pass
def test_a_pass_leaves_its_candidate_alone(compression, tiny_candidate, tiny_context):
    before, teacher = snapshot(tiny_candidate), snapshot(Candidate("t2", {}, tiny_context.teacher))
    compression.plan(tiny_candidate)
    after = compression.apply(tiny_candidate, tiny_context)
    assert snapshot(tiny_candidate) == before
    assert snapshot(Candidate("t2", {}, tiny_context.teacher)) == teacher
    assert tiny_candidate.encodings == {}
    assert snapshot(after) != before, "a pass that changes nothing tests nothing"


@every_pass
def test_encodings_decode_to_the_weights_bit_for_bit(compression, tiny_candidate, tiny_context):
    after = compression.apply(tiny_candidate, tiny_context)
    weights = after.weights()
    for name, encoding in after.encodings.items():
        assert encoding.decode().tobytes() == weights[name].tobytes(), name


@every_pass
def test_the_result_is_a_plain_network_in_evaluation_mode(
    compression, tiny_candidate, tiny_context, tiny_bundle, tiny_data
):
    after = compression.apply(tiny_candidate, tiny_context)
    assert not after.model.training
    assert not any("parametrizations" in name for name in after.model.state_dict())
    expected = probabilities(after.model, tiny_data[1])
    rebuilt = probabilities(after.copy_model(), tiny_data[1])
    assert rebuilt.tobytes() == expected.tobytes()
    bundle = assemble(tiny_bundle.manifest, after.weights(), after.encodings, tiny_bundle.golden())
    for name, value in bundle.weights().items():
        assert value.tobytes() == after.weights()[name].tobytes()


@every_pass
def test_a_pass_repeats_itself(compression, tiny_candidate, tiny_context):
    first, second = (compression.apply(tiny_candidate, tiny_context) for _ in range(2))
    assert snapshot(first) == snapshot(second)


def test_another_seed_gives_another_result(tiny_candidate, tiny_context):
    """The twin of the test above: its equality is not that of two untrained models."""
    other = Context(tiny_context.train, tiny_context.teacher, seed=6)
    compression = PASSES["magnitude_prune"]
    assert snapshot(compression.apply(tiny_candidate, tiny_context)) != snapshot(
        compression.apply(tiny_candidate, other)
    )


@every_pass
def test_progress_is_reported_to_the_end(compression, tiny_candidate, tiny_context):
    seen = []
    context = Context(tiny_context.train, tiny_context.teacher, 0, lambda *step: seen.append(step))
    compression.apply(tiny_candidate, context)
    assert seen == [(compression.name, 1, 2), (compression.name, 2, 2)]


BAD = [
    (lambda: StructuredPrune(keep={}), "keep"),
    (lambda: StructuredPrune(keep={"heads": 2}, epochs=-1), "epochs"),
    (lambda: MagnitudePrune(sparsity=1.0), "sparsity"),
    (lambda: MagnitudePrune(sparsity=math.nan), "sparsity"),
    (lambda: Cluster(bits=9), "bits"),
    (lambda: Cluster(bits=4, learning_rate=0.0), "learning_rate"),
    (lambda: Quantize(bits=1), "bits"),
    (lambda: Quantize(learning_rate=math.inf), "learning_rate"),
    (lambda: Distill(student={}), "student"),
]


@pytest.mark.parametrize(("make", "word"), BAD)
def test_parameters_out_of_range_are_errors_that_name_them(make, word):
    with pytest.raises(EdgekitError, match=word):
        make()


@pytest.mark.parametrize(
    ("compression", "word"),
    [
        (Cluster(bits=4, include=("nothing.*",)), "nothing"),
        (Quantize(include=("nothing.*",)), "nothing"),
        (MagnitudePrune(sparsity=0.5, include=("nothing.*",)), "nothing"),
        (StructuredPrune(keep={"towers": 2}), "towers"),
        (StructuredPrune(keep={"heads": 5}), "heads = 5"),
        (Distill(student={"tails": 3}), "tails"),
    ],
)
def test_what_the_model_has_not_is_an_error_before_anything_is_done(compression, word, tiny_candidate):
    with pytest.raises(EdgekitError, match=word):
        compression.plan(tiny_candidate)


@pytest.mark.parametrize(
    "second",
    [Cluster(bits=2, epochs=3, include=("classifier.*",)), Quantize(bits=4, epochs=3, include=("classifier.*",))],
)
def test_training_keeps_away_from_weights_that_are_encoded_already(second, tiny_candidate, tiny_context):
    """Otherwise the rest of the model would be trained for weights that are then put back on their codebook."""
    first = Cluster(bits=3, epochs=0, include=("blocks.*",)).apply(tiny_candidate, tiny_context)
    moved = []
    remember = Context(tiny_context.train, tiny_context.teacher, 5, lambda *step: moved.append(step))
    after = second.apply(first, remember)
    assert moved, "nothing was trained"
    held = matrices(first.model, ("blocks.*",))
    for name in held:
        assert after.weights()[name].tobytes() == first.weights()[name].tobytes()
        assert after.encodings[name] is first.encodings[name]
    assert after.weights()["embed.weight"].tobytes() != first.weights()["embed.weight"].tobytes()


def test_frozen_weights_do_not_train_and_the_others_do(tiny_candidate, tiny_context):
    from edgekit.passes.base import recover

    free, held = tiny_candidate.copy_model(), tiny_candidate.copy_model()
    frozen(held, ["embed.weight"])
    trained = {name: recover(model, tiny_context, 1, 1e-2, "x") for name, model in (("free", free), ("held", held))}
    start = tiny_candidate.weights()["embed.weight"]
    assert np.array_equal(trained["held"].embed.weight.detach().numpy(), start)
    assert not np.array_equal(trained["free"].embed.weight.detach().numpy(), start)


def test_decoded_writes_the_encoding_into_the_model(tiny_candidate):
    model = tiny_candidate.copy_model()
    codes = np.ones((3, 16), np.int8)
    scale = np.full((3, 1), 0.5, np.float32)
    decoded({"classifier.weight": Affine(4, codes, scale)}, model)
    assert np.array_equal(model.classifier.weight.detach().numpy(), np.full((3, 16), 0.5, np.float32))
