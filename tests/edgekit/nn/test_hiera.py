"""The hierarchical classifiers against transformers' own Hiera, against a formulation with five axes, and fused."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from edgekit.errors import EdgekitError
from edgekit.nn import hiera
from edgekit.nn.hiera_config import MOST_NUMBERS, Entry, HieraConfig, arguments, published
from edgekit.nn.levit import LevitBlock, LinearNorm

MIXED = HieraConfig(
    (1, 2, 2, 2), ("rep", "inverted", "window", "global"), (1, 3, 2, 2), (True, True, True), 16, 16, 4, "conv3x2",
    image=64, channels=1, classes=5,
)  # fmt: skip

LEVIT = HieraConfig(
    (1, 2, 2, 1), ("rep", "levit", "levit", "global"), (1, 2, 3, 2), (True, True, True), 8, 8, 4, "conv3x2",
    image=64, channels=1, classes=5,
)  # fmt: skip


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data = torch.rand_like(value) * 0.2 + (0.5 if value.ndim == 1 else -0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("depths", "heads", "side", "unit"),
    [((1, 1, 2, 1), 2, 64, 8), ((2, 1, 1, 1), 1, 128, 8), ((1, 2, 1, 2), 1, 128, 16)],
)
def test_outputs_are_those_of_transformers(depths, heads, side, unit):
    import transformers  # takes seconds, and only this test needs it

    theirs = randomized(
        transformers.HieraForImageClassification(
            transformers.HieraConfig(
                depths=list(depths), embed_dim=16, num_heads=[heads << n for n in range(4)], num_labels=7,
                image_size=[side, side], masked_unit_size=[unit, unit],
            )
        )
    )  # fmt: skip
    config = published(depths, 16, heads, classes=7, image=side)
    config = HieraConfig(**{**arguments(config), "mask_unit": unit})
    ours = hiera.build(**arguments(config)).eval()
    ours.load_state_dict(hiera.from_transformers(theirs.state_dict(), depths))
    image = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected, found = theirs(image).logits, ours(image)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_published_tiny_network_has_the_published_size():
    model = hiera.build(**arguments(published((1, 2, 7, 2), 96, 1)))
    assert sum(value.numel() for value in model.parameters()) == 27_910_216  # table 7: 28 M


def test_the_bound_is_above_the_size():
    for kinds in (
        ("rep", "inverted", "window", "global"),
        ("separable",) * 4,
        ("inverted",) * 4,
        ("window",) * 4,
        ("levit",) * 4,
    ):
        config = HieraConfig(
            **{**arguments(MIXED), "kinds": kinds, "mask_unit": 16 if kinds[0] in ("window", "levit") else 4}
        )
        model = hiera.build(**arguments(config))
        numbers = sum(value.numel() for value in (*model.parameters(), *model.buffers()))
        assert numbers <= config.most_numbers <= 20 * numbers


def test_the_published_large_network_is_within_the_bound():
    assert published((2, 6, 36, 4), 144, 2).most_numbers <= MOST_NUMBERS


def test_weights_of_another_network_are_refused():
    with pytest.raises(EdgekitError, match=r"'hiera.encoder.stages.9.layers.0.proj.weight' is no weight of a Hiera"):
        hiera.from_transformers({"hiera.encoder.stages.9.layers.0.proj.weight": torch.zeros(1)}, (1, 1, 1, 1))


def test_neighbours_are_pooled_together():
    """Token numbers, ordered by unit and pooled by their maximum, are the maxima of squares of the image."""
    config = HieraConfig(
        (1, 1, 1), ("window",) * 3, (1,) * 3, (True, True), 1, 1, 8, image=64, channels=1, classes=2
    )  # fmt: skip
    numbers = torch.randperm(256, generator=torch.Generator().manual_seed(0)).float().reshape(1, 1, 16, 16)
    tokens = hiera.by_unit(numbers.reshape(1, 256, 1), config)
    assert tokens.shape == (1, 4, 64, 1)
    units = numbers.reshape(2, 8, 2, 8).permute(0, 2, 1, 3).reshape(4, 64)
    for pools in (0, 1, 2):
        side = 16 >> pools
        squares = F.max_pool2d(numbers, 1 << pools).reshape(side, side)
        found = tokens.reshape(4, 4**pools, -1).amax(dim=1)
        for unit, (row, column) in enumerate(itertools.product(range(2), repeat=2)):
            half = side // 2
            square = squares[row * half : (row + 1) * half, column * half : (column + 1) * half]
            assert sorted(found[unit].tolist()) == sorted(square.flatten().tolist())
    assert sorted(tokens[0, 0].flatten().tolist()) == sorted(units[0].tolist())


def naive(block: hiera.AttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """The block in float64, with loops over images, units, heads and queries."""
    entry, attention = block.entry, block.attn
    normed = block.norm1(x)
    shortcut = x if block.shortcut is None else block.shortcut(normed)
    out = torch.zeros(len(x), entry.units, entry.tokens // (4 if entry.pool else 1), entry.out, dtype=x.dtype)
    query, key, value = attention.qkv(normed).chunk(3, dim=-1)
    quarter = entry.tokens // 4
    for image, unit, head in itertools.product(
        range(len(x)), range(entry.units), range(entry.out // attention.head_dim)
    ):
        part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        seen = range(entry.units) if attention.groups > 1 else [unit]
        keys = torch.cat([key[image, other][:, part] for other in seen])
        values = torch.cat([value[image, other][:, part] for other in seen])
        queries = query[image, unit][:, part]
        if entry.pool:
            queries = torch.stack([queries[n::quarter].amax(dim=0) for n in range(quarter)])
        for n, q in enumerate(queries):
            weights = torch.softmax(keys @ q / attention.head_dim**0.5, dim=0)
            out[image, unit, n, part] = weights @ values
    if entry.pool:
        shortcut = torch.stack([shortcut[:, :, n::quarter].amax(dim=2) for n in range(quarter)], dim=2)
    x = shortcut + attention.proj(out)
    return x + block.fc2(F.gelu(block.fc1(block.norm2(x))))


@pytest.mark.parametrize("between_units", [False, True])
@pytest.mark.parametrize("pool", [False, True])
def test_a_block_is_its_formula(pool, between_units):
    entry = Entry(8, 16 if pool else 8, 3, 8, pool)
    torch.manual_seed(1)
    block = hiera.AttentionBlock(entry, 4, 2, between_units=between_units).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), naive(block, x), rtol=1e-10, atol=1e-10)


def naive_levit(block: LevitBlock, x: torch.Tensor) -> torch.Tensor:
    """The block in float64, with loops over images, heads and queries, and each normalization by its formula."""

    def layer(module: LinearNorm, tokens: torch.Tensor) -> torch.Tensor:
        norm = module.norm
        y = tokens @ module.linear.weight.T
        return (y - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias

    entry, keys = block.entry, block.keys
    left, width = entry.tokens // (4 if entry.pool else 1), entry.out // block.heads
    asked = x[:, :, :left]  # the first of each square: the slowest axis of a unit is the position in its square
    found = torch.zeros(len(x), entry.units * left, entry.out, dtype=x.dtype)
    for image, head in itertools.product(range(len(x)), range(block.heads)):
        q = layer(block.query, asked[image]).flatten(0, 1)[:, head * keys : (head + 1) * keys]
        k = layer(block.key, x[image]).flatten(0, 1)[:, head * keys : (head + 1) * keys]
        v = layer(block.value, x[image]).flatten(0, 1)[:, head * width : (head + 1) * width]
        for n, row in enumerate(q):
            found[image, n, head * width : (head + 1) * width] = torch.softmax(k @ row / keys**0.5, dim=0) @ v
    y = layer(block.proj, F.hardswish(found)).reshape(len(x), entry.units, left, entry.out)
    x = x + y if entry.channels == entry.out else y
    return x + layer(block.fc2, F.hardswish(layer(block.fc1, x)))


@pytest.mark.parametrize(("out", "pool"), [(8, False), (16, False), (16, True)])
def test_a_levit_block_is_its_formula(out, pool):
    block = randomized(LevitBlock(Entry(8, out, 3, 8, pool), 4, 2)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), naive_levit(block, x), rtol=1e-10, atol=1e-10)


def test_queries_that_are_left_out_are_those_of_every_second_row_and_column():
    config = HieraConfig((1, 1), ("levit", "levit"), (1, 1), (True,), 4, 4, 8, image=64, channels=1, classes=2)
    numbers = torch.arange(256.0).reshape(1, 16, 16)
    tokens = hiera.by_unit(numbers.reshape(1, 256, 1).expand(1, 256, 4), config)
    left = tokens.shape[2] // 4
    assert sorted(tokens[:, :, :left, 0].flatten().tolist()) == sorted(numbers[:, ::2, ::2].flatten().tolist())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", [MIXED, LEVIT])
def test_gradients_are_those_of_differences(config, batch):
    """Of every parameter along its own direction; torch's own was wrong at batch 1 behind a transposed view."""
    model = randomized(hiera.build(**arguments(config))).double()
    image = torch.randn(batch, 1, 64, 64, dtype=torch.float64)
    names, values = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(model(image).sum(), values)
    for name, value, gradient in zip(names, values, gradients, strict=True):
        found = float((value * gradient).sum().detach())
        with torch.no_grad():
            kept = value.clone()
            high, low = (
                float(model(image).sum()) for factor in (1e-6, -1e-6) if value.copy_(kept * (1 + factor)) is value
            )
            value.copy_(kept)
        assert found == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("config", [MIXED, LEVIT])
def test_a_fused_network_has_the_same_outputs(config):
    torch.manual_seed(0)
    model = hiera.build(**arguments(config)).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data = torch.rand_like(value) + 0.5
    image = torch.randn(3, 1, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        fused = hiera.fuse(model)
        torch.testing.assert_close(fused(image), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
        name, bias = next((name, value) for name, value in fused.named_parameters() if name.endswith("bias"))
        bias += 1e-3  # a wrong bias is noticed
        assert (fused(image) - expected).abs().max() > 1e-8 * float(expected.abs().max()), name
    assert not [module for module in fused.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    hiera.build(fused=True, **arguments(config)).load_state_dict(fused.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (1, 2)}, "one value for each of 1 to 8 stages"),
        ({"depths": "1212"}, "depths = '1212'; expected one value for each stage"),
        ({"depths": (1, 2, 2, 10**9)}, r"whole numbers from 1 to 200"),
        ({"width": 2.5}, r"width = 2.5; expected a whole number"),
        ({"kinds": ("rep", "window", "rep", "global")}, "convolutional stages come before"),
        ({"kinds": ("rep", "window", "deep", "global")}, "kind 'deep'; allowed: window, global, levit, inverted"),
        ({"stem": "conv9"}, "stem = 'conv9'; allowed: conv7, patch4, conv3x2"),
        ({"image": 40}, "image = 40; expected a multiple of 32"),
        ({"mask_unit": 3}, "mask_unit = 3; it must divide the 4 tokens"),
        ({"mask_unit": 1}, "mask_unit = 1; expected a multiple of 2"),
        ({"kinds": ("rep", "rep", "levit", "levit"), "head_dim": 1}, "head_dim = 1; levit stages need an even one"),
        ({"head_dim": 48}, "head_dim = 48; it must divide the width 64"),
        ({"pools": (1, 0, 1)}, "expected true or false"),
        ({"deep": 1}, "allowed arguments: depths, kinds"),
        ({"width": 8192, "head_dim": 16}, "a network of up to .* numbers; edgekit builds up to 268,435,456"),
        ({"depths": (200, 200, 200, 200), "ratios": (200,) * 4}, "a network of up to"),
        ({"image": 2048, "width": 4096}, "a network of up to"),
        ({"classes": 1 << 20, "width": 512}, "a network of up to"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(EdgekitError, match=message):
        hiera.build(**{**arguments(MIXED), **change})
