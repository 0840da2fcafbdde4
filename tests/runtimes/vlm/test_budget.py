"""A budget over stock LLaVAs with random weights: exact counts, the same bits at 100 %, and rows that do not depend on
each other."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

import edgekit
from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.geometry import anyres
from edgekit.passes.visual_tokens.methods import METHODS
from runtimes.vlm.adapters import adapter

IMAGE, PAD, SIDE, PATCH = 90, 0, 24, 4  # 6 x 6 tokens of a view
CANVASES = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
SIZES = [
    (48, 48), (40, 53), (53, 40), (20, 66), (66, 20), (24, 24), (9, 9), (100, 99), (30, 70), (10, 60),
]  # fmt: skip
RATES = (0.4, 0.2, 0.1, 0.05)


def small(kind, config_kind, **options):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=SIDE,
        patch_size=PATCH, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = kind(config_kind(vision_config=vision, text_config=text, image_token_id=IMAGE, **options)).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.4)
    return model


@pytest.fixture(scope="module")
def llava():
    return small(LlavaForConditionalGeneration, LlavaConfig, image_seq_length=36)


@pytest.fixture(scope="module")
def following():
    return small(LlavaNextForConditionalGeneration, LlavaNextConfig, image_grid_pinpoints=CANVASES)


def geometry_of(size):
    return anyres(size, tuple(map(tuple, CANVASES)), SIDE, SIDE // PATCH)


def prompt(sizes, seed=0, before=(1, 5, 6), after=(7, 8, 9)):
    """What a processor returns for a prompt with images of these sizes."""
    torch.manual_seed(seed)
    geometries = [geometry_of(size) for size in sizes]
    ids = list(before)
    for geometry in geometries:
        ids += [IMAGE] * len(geometry.sequence) + [11]
    pixels = torch.zeros(len(sizes), max(g.views for g in geometries), 3, SIDE, SIDE)
    for index, geometry in enumerate(geometries):
        pixels[index, : geometry.views] = torch.randn(geometry.views, 3, SIDE, SIDE)
    ids = torch.tensor([ids + list(after)])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
    }  # fmt: skip


def batch(first, second):
    """Two prompts, padded on the left."""
    length = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    views = max(first["pixel_values"].shape[1], second["pixel_values"].shape[1])
    ids, masks, pixels = [], [], []
    for item in (first, second):
        missing = length - item["input_ids"].shape[1]
        ids.append(torch.nn.functional.pad(item["input_ids"], (missing, 0), value=PAD))
        masks.append(torch.nn.functional.pad(item["attention_mask"], (missing, 0)))
        room = views - item["pixel_values"].shape[1]
        pixels.append(torch.nn.functional.pad(item["pixel_values"], (0, 0, 0, 0, 0, 0, 0, room)))
    return {
        "input_ids": torch.cat(ids), "attention_mask": torch.cat(masks), "pixel_values": torch.cat(pixels),
        "image_sizes": torch.cat([first["image_sizes"], second["image_sizes"]]),
    }  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_budget_of_everything_is_the_stock_model_to_the_bit(following, size):
    inputs = prompt([size])
    with torch.no_grad():
        expected = following(**inputs).logits
        assert torch.equal(edgekit.vlm.token_budget(following, 1.0)(**inputs).logits, expected)
    assert edgekit.vlm.token_budget(following, 1.0).prepare(**inputs).keys() == inputs.keys()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rate", RATES)
def test_counts_are_exact_at_every_aspect_ratio(following, size, rate):
    geometry = geometry_of(size)
    pruned = edgekit.vlm.token_budget(following, rate)
    found = pruned.prepare(**prompt([size]))
    wanted = max(1, min(int(rate * geometry.views * 36 + 1e-9), len(geometry.candidates)))
    assert int((found["input_ids"] == IMAGE).sum()) == wanted
    assert [len(item) for item in found["mm_encoder_outputs"]["image"].pooler_output] == [wanted]
    assert found["input_ids"].shape[1] == wanted + 7
    assert pruned.report.visual == ((wanted, len(geometry.candidates)),)


def test_all_tokens_without_line_ends_have_the_stock_features(following):
    """A count of all tokens keeps each of them, so the features are the stock model's without its line ends."""
    inputs = prompt([(40, 53)])
    geometry = geometry_of((40, 53))
    found = edgekit.vlm.token_budget(following, len(geometry.candidates), "hired").prepare(**inputs)
    with torch.no_grad():
        stock = following.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    expected = stock[geometry.sequence != -1]
    torch.testing.assert_close(found["mm_encoder_outputs"]["image"].pooler_output[0], expected, rtol=1e-4, atol=1e-5)


def test_kept_features_are_those_of_the_kept_places(following):
    inputs = prompt([(20, 66)])
    geometry = geometry_of((20, 66))
    pruned = edgekit.vlm.token_budget(following, 0.2, "hired", positions="original")
    found = pruned.prepare(**inputs)
    with torch.no_grad():
        stock = following.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    places = found["position_ids"][0, 3:-4] - 3  # three tokens come before the image
    assert (geometry.sequence[places] != -1).all()
    torch.testing.assert_close(
        found["mm_encoder_outputs"]["image"].pooler_output[0], stock[places], rtol=1e-4, atol=1e-5
    )
    assert found["position_ids"][0, -4:].tolist() == list(range(len(geometry.sequence) + 3, len(geometry.sequence) + 7))


@pytest.mark.parametrize("layer", [0, 2])
def test_scores_are_the_attention_of_the_stock_tower(following, layer):
    views = prompt([(48, 48)])["pixel_values"][0]
    tower = following.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        stock = tower(views, output_attentions=True, output_hidden_states=True)
        features, scores = adapter(following).tower(views)
    tower.set_attn_implementation("sdpa")
    torch.testing.assert_close(
        scores.attention[layer], stock.attentions[layer][:, :, 0, 1:].sum(1), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(features, stock.hidden_states[-2][:, 1:], rtol=1e-4, atol=1e-5)
    assert scores.feature_layer == 2


@pytest.mark.parametrize("name", [*sorted(set(METHODS) - {"cdpruner"})])
def test_every_method_generates(following, name):
    inputs = prompt([(48, 48)])
    found = edgekit.vlm.token_budget(following, 0.1, name).generate(**inputs, max_new_tokens=3, do_sample=False)
    assert found.shape[1] > 7 + 10


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_row_does_not_depend_on_the_other_one(following, positions):
    """Greedy answers of a batch with padding on the left are those of each prompt alone, token for token."""
    first, second = prompt([(48, 48)], 1, (1, 5)), prompt([(20, 66)], 2, (1, 5, 6, 20, 21))
    pruned = edgekit.vlm.token_budget(following, 0.2, positions=positions)
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = [pruned.generate(**item, **options)[0, -6:].tolist() for item in (first, second)]
    together = pruned.generate(**batch(first, second), **options)[:, -6:].tolist()
    assert together == alone
    assert alone[0] != alone[1]


def test_several_images_and_beams(following):
    inputs = prompt([(48, 48), (20, 66), (24, 24)])
    pruned = edgekit.vlm.token_budget(following, 0.2)
    found = pruned.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    assert found.shape[0] == 1
    assert [kept for kept, _ in pruned.report.visual] == [
        int(0.2 * geometry_of(size).views * 36 + 1e-9) for size in ((48, 48), (20, 66), (24, 24))
    ]
    one = pruned.generate(**inputs, max_new_tokens=4, num_beams=1, do_sample=False)
    assert one[0, : pruned.report.length].tolist() == found[0, : pruned.report.length].tolist()


def test_one_view_of_llava(llava):
    torch.manual_seed(3)
    ids = torch.tensor([[1, 5, *[IMAGE] * 36, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    with torch.no_grad():
        assert torch.equal(edgekit.vlm.token_budget(llava, 1.0)(**inputs).logits, llava(**inputs).logits)
    for rate, count in zip(RATES, (14, 7, 3, 1), strict=True):
        pruned = edgekit.vlm.token_budget(llava, rate)
        assert pruned.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] >= count + 4
        assert pruned.report.visual == ((count, 36),)


def test_a_prompt_without_images_is_the_models(following):
    ids = torch.tensor([[1, 5, 7, 8]])
    with torch.no_grad():
        found = edgekit.vlm.token_budget(following, 0.2)(input_ids=ids).logits
        assert torch.equal(found, following(input_ids=ids).logits)


def test_what_does_not_fit_is_named(following):
    inputs = prompt([(48, 48)])
    pruned = edgekit.vlm.token_budget(following, 0.2)
    with pytest.raises(EdgekitError, match="placeholders of images, and the images"):
        pruned.prepare(**{**inputs, "input_ids": inputs["input_ids"][:, 4:], "attention_mask": None})
    with pytest.raises(EdgekitError, match="image_sizes are missing"):
        pruned.prepare(**{**inputs, "image_sizes": None})
    with pytest.raises(EdgekitError, match="has 5 views, and pixel_values holds 2"):
        pruned.prepare(**{**inputs, "pixel_values": inputs["pixel_values"][:, :2]})
    with pytest.raises(EdgekitError, match="'llama'"):
        edgekit.vlm.token_budget(following.model.language_model, 0.2)
    with pytest.raises(EdgekitError, match="'packed'"):
        edgekit.vlm.token_budget(following, 0.2, positions="packed")
    with pytest.raises(EdgekitError, match="at most 1"):
        edgekit.vlm.token_budget(following, 1.2)
