"""Units that are removed together, on networks small enough to say by hand which positions belong to one."""

import pytest
import torch
from torch import nn

from edgekit.nn.module import remove
from edgekit.nn.units import Group, find_groups, removal, results

pytest.importorskip("torch_pruning")


class Attention(nn.Module):
    """Heads of four numbers, whose three projections are one layer."""

    def __init__(self, *, heads=2, swapped=False, other_names=False):
        super().__init__()
        self.num_heads, self.swapped, width = heads, swapped, 4
        self.qkv, self.proj = nn.Linear(8, 3 * heads * width), nn.Linear(heads * width, 8)
        if other_names:
            self.mixed = self.qkv
            del self.qkv

    def forward(self, x):
        batch, tokens, _ = x.shape
        parts = (self.mixed if hasattr(self, "mixed") else self.qkv)(x)
        shape = (batch, tokens, 3, -1, self.num_heads) if self.swapped else (batch, tokens, 3, self.num_heads, 4)
        parts = parts.reshape(shape)
        parts = parts.transpose(3, 4) if self.swapped else parts
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


TOKENS = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))]
ROWS = [torch.randn(4, 6, generator=torch.Generator().manual_seed(1))]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def groups_of(model, example, round_to=1):
    groups, alone = find_groups(model, example, round_to)
    return {group.name: group for group in groups}, alone


def test_a_hidden_channel_is_a_row_here_and_a_column_there():
    (group,) = (group for group in groups_of(seeded(mlp), ROWS)[0].values() if group.name == "0")
    assert (group.category, group.size) == ("channels", 8)
    expected = {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)}
    assert set(group.axes) == expected
    assert all(list(units) == [[number] for number in range(8)] for units in group.axes.values())
    assert group.consumers == (("2.weight", 1),)


def test_a_head_is_a_run_in_each_of_the_three_projections():
    groups, alone = groups_of(seeded(Attention), TOKENS)
    group = groups[""]
    assert alone.get("") is None
    assert (group.category, group.size, group.counts) == ("heads", 2, {"num_heads": 1})
    first, second = ([*range(s, s + 4), *range(s + 8, s + 12), *range(s + 16, s + 20)] for s in (0, 4))
    assert group.axes["qkv.weight", 0] == [first, second]
    assert group.axes["proj.weight", 1] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Attention(swapped=True), "its heads are laid out in another order"),
        (lambda: Attention(heads=1), "one head"),
        (lambda: Attention(other_names=True), "attention whose projections have other names"),
    ],
)
def test_an_attention_that_cannot_lose_a_head_says_why(make, reason):
    groups, alone = groups_of(seeded(make), TOKENS)
    assert alone[""].startswith(reason)
    assert all(group.category == "channels" for group in groups.values())


@pytest.mark.parametrize(("make", "example"), [(mlp, ROWS), (Attention, TOKENS)])
def test_without_a_unit_the_network_is_the_one_that_does_not_read_it(make, example):
    """For every group that has a consumer, and a unit in the middle of it."""
    model = seeded(make)
    checked = 0
    for group in groups_of(model, example)[0].values():
        if not group.consumers or group.size < 2:
            continue
        unit = group.size // 2
        silent, cut = seeded(make), seeded(make)
        for name, axis in group.consumers:
            silent.get_parameter(name).data.index_fill_(axis, torch.tensor(group.axes[name, axis][unit]), 0)
        remove(cut, removal(model, [(group, [unit])]))
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            (found,), (expected,) = results(cut, example), results(silent, example)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        (other,) = results(model, example)
        assert (other - expected).abs().max() > 1e-4, "the unit matters"
        checked += 1
    assert checked


def test_normalizations_in_groups_keep_their_groups_equally_many():
    def normalized():
        return nn.Sequential(nn.Conv1d(6, 8, 1), nn.GroupNorm(4, 8), nn.Conv1d(8, 3, 1))

    groups, _ = groups_of(seeded(normalized), [torch.randn(2, 6, 5)], round_to=2)
    assert (groups["0"].step, groups["0"].shares) == (4, 4)
    assert groups_of(seeded(mlp), ROWS, round_to=2)[0]["0"].step == 2


def test_positions_that_two_groups_lose_at_one_place_are_one_step():
    class Holder(nn.Module):
        heads = 4

    axes = {("a.weight", 0): [[0], [1], [2]], ("b.weight", 1): [[0, 1], [2, 3], [4, 5]]}
    first = Group("a", "channels", 3, axes, (), {"heads": 2})
    second = Group("c", "channels", 2, {("a.weight", 0): [[5], [6]], ("d.bias", 0): [[0], [5]]}, ())
    steps = removal(Holder(), [(first, [0, 2]), (second, [1])])
    assert steps == [
        {"removed": "0,2,6", "from": ["a.weight:0"]},
        {"removed": "0-1,4-5", "from": ["b.weight:1"]},
        {"removed": "5", "from": ["d.bias:0"]},
        {"attributes": {"heads": 0}},
    ]
    assert removal(Holder(), [(second, [])]) == []


def test_one_output_or_several_are_a_list():
    class Two(nn.Module):
        def forward(self, x):
            return x, x + 1

    x = torch.zeros(1)
    assert [value.item() for value in results(Two(), [x])] == [0.0, 1.0]
    assert len(results(nn.Identity(), [x])) == 1
