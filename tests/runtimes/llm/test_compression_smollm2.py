"""The methods on a layer of a real model, with real activations, measured on text that they have not seen."""

from dataclasses import replace

import pytest

from runtimes.llm.compression.forward import LayerEngine
from runtimes.llm.compression.plan import of
from runtimes.llm.compression.quantise import quantised
from runtimes.llm.compression.rounding import plain
from runtimes.llm.compression.texts import texts
from runtimes.llm.source import open_source

pytestmark = pytest.mark.models
LAYER = 3


def test_each_method_beats_rounding_to_nearest_on_unseen_text(smollm2_file):
    source = open_source(smollm2_file)
    model, text = source.model, texts(source.tokenizer, [], 256, 1024)
    engine = LayerEngine(model, 256)
    calibration, held_out = engine.begun(text.calibration), engine.begun(text.held_out)
    for number in range(LAYER):
        engine.run_layer(number, model.layers[number], calibration + held_out)
    # its file has 4 bits: what these decode to is the source
    layer = replace(
        model.layers[LAYER], **{role: plain(t.name, t.values()) for role, t in of(model.layers[LAYER]).items()}
    )
    moments = {}
    engine.run_layer(LAYER, layer, [window.copy() for window in calibration], moments)
    expected = [window.copy() for window in held_out]
    engine.run_layer(LAYER, layer, expected)

    def loss(method):
        found = [window.copy() for window in held_out]
        engine.run_layer(LAYER, quantised(layer, "Q4_0", method, moments, model.architecture, 0.01), found)
        return sum(
            float((after.state.hidden - before.state.hidden).square().sum())
            for before, after in zip(expected, found, strict=True)
        )

    losses = {method: loss(method) for method in ("nearest", "gptq", "awq", "awq+gptq")}
    assert losses["gptq"] < 0.9 * losses["nearest"], losses
    assert losses["awq"] < 0.9 * losses["nearest"], losses
    assert losses["awq+gptq"] < min(losses["gptq"], losses["awq"]), losses
