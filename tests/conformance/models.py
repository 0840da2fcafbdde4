"""Small networks that break compressors and exporters, written from the papers: random weights, one factory each.

INPUTS: what each takes, as `edgekit import --input` says it; OUTPUTS: names, where it is not one "output"; STATE: which
output a caller hands back as which input.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUTS: dict[str, dict[str, str]] = {
    "vit": {"image": "float32:batch,3,32,32"},
    "deit_tiny": {"image": "float32:batch,3,32,32"},
    "crate_block": {"tokens": "float32:batch,tokens,32"},
    "hourglass": {"ids": "int64:batch,9*faces"},
    "leaky_hourglass": {"ids": "int64:batch,9*faces"},
    "lfq_tokenizer": {
        "video": "float32:batch,3,frames,8,8", "before1": "float32:batch,3,2,8,8", "before2": "float32:batch,16,2,4,4"
    },
    "flow_step": {
        "positions": "float32:batch,atoms,3", "kinds": "float32:batch,atoms,4", "time": "float32:batch,1"
    },
    "unet": {"image": "float32:batch,1,4*rows,4*columns", "time": "float32:batch"},
    "llama_block": {"ids": "int64:batch,tokens"},
    "mixture": {"tokens": "float32:batch,tokens,16"},
}  # fmt: skip
OUTPUTS = {"lfq_tokenizer": ("codes", "after1", "after2")}
STATE = {"lfq_tokenizer": {"before1": "after1", "before2": "after2"}}


class Attention(nn.Module):
    """Multi-head attention over all tokens, or over the earlier tokens only."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.num_heads, self.head_dim, self.causal = heads, dim // heads, causal
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = attention(*parts.unbind(0), mask=causal_mask(x) if self.causal else None)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(dim=-1) @ value


def causal_mask(x: Tensor, window: int | None = None) -> Tensor:
    """Return (tokens, tokens), true if a row may attend to a column. The graph builds the mask from the shape."""
    at = torch.arange(x.shape[1], device=x.device)
    apart = at[:, None] - at[None, :]
    return (apart >= 0) if window is None else (apart >= 0) & (apart < window)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, causal: bool = False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads, causal)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2021, arXiv 2010.11929, section 3.1, in small."""

    def __init__(self, dim: int, depth: int, classes: int):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, stride=8)
        self.first, self.position = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 17, dim))
        self.blocks = nn.Sequential(*(Block(dim, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(dim: int = 32, depth: int = 2, classes: int = 10) -> nn.Module:
    return VisionTransformer(dim, depth, classes)


def deit_tiny(depth: int = 2) -> nn.Module:
    """Return timm's network with the published width, for small images."""
    import timm

    return timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, num_classes=10)


class CrateBlock(nn.Module):
    """White-box transformer: MSSA, one projection for query, key and value, and ISTA, one sparse-coding step with a
    dictionary that is used as itself and transposed (Yu et al. 2023, arXiv 2306.01129, sections 2.3 and 2.4)."""

    def __init__(self, dim: int, heads: int, step: float = 0.1, threshold: float = 0.1):
        super().__init__()
        self.heads, self.step, self.threshold = heads, step, threshold
        self.norm1, self.subspace, self.mix = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.norm2, self.dictionary = nn.LayerNorm(dim), nn.Parameter(torch.randn(dim, dim) / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        same = self.subspace(self.norm1(x)).reshape(batch, tokens, self.heads, dim // self.heads).transpose(1, 2)
        x = x + self.mix(attention(same, same, same).transpose(1, 2).reshape(batch, tokens, dim))
        x = self.norm2(x)
        decoded = x @ self.dictionary.T
        gradient = (decoded - x) @ self.dictionary
        return F.relu(x - self.step * gradient - self.step * self.threshold)


def crate_block(dim: int = 32, heads: int = 4, depth: int = 2) -> nn.Module:
    return nn.Sequential(*(CrateBlock(dim, heads) for _ in range(depth)))


class Hourglass(nn.Module):
    """Coordinates, vertices of 3, faces of 9: shorter by 3 twice, each level attending to its own past, then longer
    again. Up-sampling shifts right by 2, so that no token hears of its own group's end (Meshtron, Hao et al. 2024,
    arXiv 2412.09548, section 3.1; Hierarchical transformers, Nawrot et al. 2022, arXiv 2110.13711)."""

    def __init__(self, dim: int, levels: int, shift: int):
        super().__init__()
        self.shift = shift
        self.embed = nn.Embedding(16, dim)
        self.down = nn.ModuleList(nn.Linear(3 * dim, dim) for _ in range(levels - 1))
        self.up = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(levels - 1))
        self.before = nn.ModuleList(Block(dim, 2, causal=True) for _ in range(levels))
        self.after = nn.ModuleList(Block(dim, 2, causal=True) for _ in range(levels - 1))
        self.head = nn.Linear(dim, 16)

    def level(self, x: Tensor, number: int) -> Tensor:
        x = self.before[number](x)
        if number == len(self.down):
            return x
        batch, tokens, dim = x.shape
        short = self.level(self.down[number](x.reshape(batch, tokens // 3, 3 * dim)), number + 1)
        long = self.up[number](short).reshape(batch, tokens, dim)
        return self.after[number](x + F.pad(long, (0, 0, self.shift, -self.shift)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.level(self.embed(ids), 0))


def hourglass(dim: int = 16, levels: int = 3) -> nn.Module:
    return Hourglass(dim, levels, shift=2)


def leaky_hourglass(dim: int = 16, levels: int = 3) -> nn.Module:
    """Return the planted failure: without the shift, a token depends on the two after it."""
    return Hourglass(dim, levels, shift=0)


class CausalConv(nn.Module):
    """A convolution over frames that looks back only; the frames before a chunk are an explicit input and output."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, out, 3, stride=(1, stride, stride), padding=(0, 1, 1))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([before, x], dim=2)
        return self.conv(x), x[:, :, -2:]


class Tokenizer(nn.Module):
    """Causal 3-D convolutions and lookup-free quantization: the code is the sign of each channel (MAGVIT-v2, Yu et al.
    2024, arXiv 2310.05737, sections 3.1 and 3.2)."""

    def __init__(self, bits: int):
        super().__init__()
        self.first, self.second, self.last = CausalConv(3, 16, 2), CausalConv(16, 32, 1), nn.Conv3d(32, bits, 1)
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    def forward(self, video: Tensor, before1: Tensor, before2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, after1 = self.first(video, before1)
        x, after2 = self.second(F.elu(x), before2)
        z = self.last(F.elu(x)).permute(0, 2, 3, 4, 1)
        # torch.sign(0) is 0, which is no code
        return (torch.where(z > 0, 1, 0) * self.powers).sum(dim=-1), after1, after2


def lfq_tokenizer(bits: int = 18) -> nn.Module:
    return Tokenizer(bits)


class FlowStep(nn.Module):
    """One Euler step of a flow whose velocity turns with the molecule: EGNN (Satorras et al. 2021, arXiv 2102.09844,
    equations 3 to 6) on the path of Lipman et al. 2023, arXiv 2210.02747."""

    def __init__(self, kinds: int, dim: int, layers: int, steps: int):
        super().__init__()
        self.steps, self.embed = steps, nn.Linear(kinds + 1, dim)
        self.edge = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dim + 1, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU()) for _ in range(layers)
        )
        self.pull = nn.ModuleList(nn.Linear(dim, 1) for _ in range(layers))
        self.node = nn.ModuleList(nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU()) for _ in range(layers))

    def forward(self, positions: Tensor, kinds: Tensor, time: Tensor) -> Tensor:
        batch, atoms, _ = positions.shape
        x, start = positions, positions
        h = self.embed(torch.cat([kinds, time[:, None].expand(batch, atoms, 1)], dim=-1))
        for edge, pull, node in zip(self.edge, self.pull, self.node, strict=True):
            apart = x[:, :, None] - x[:, None]
            square = (apart * apart).sum(dim=-1, keepdim=True)
            pairs = [h[:, :, None].expand(-1, -1, atoms, -1), h[:, None].expand(-1, atoms, -1, -1), square]
            message = edge(torch.cat(pairs, dim=-1))
            x = x + (apart / (1 + square) * pull(message)).mean(dim=2)
            h = h + node(torch.cat([h, message.mean(dim=2)], dim=-1))
        return positions + (x - start) / self.steps


def flow_step(kinds: int = 4, dim: int = 16, layers: int = 2, steps: int = 8) -> nn.Module:
    return FlowStep(kinds, dim, layers, steps)


class Stage(nn.Module):
    """A convolution, a group norm and the shift by the time, with a skip connection."""

    def __init__(self, channels: int, out: int, time: int):
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out)
        self.time, self.second = nn.Linear(time, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        inner = F.silu(self.norm(self.first(x)) + self.time(time)[:, :, None, None])
        return self.skip(x) + self.second(inner)


class UNet(nn.Module):
    """A denoiser: the resolution is halved twice and doubled twice, with skip connections (Ho et al. 2020, arXiv
    2006.11239, appendix B)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.down = nn.ModuleList([Stage(1, width, width), Stage(width, 2 * width, width)])
        self.pool = nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1) for c in (width, 2 * width)])
        self.middle = Stage(2 * width, 2 * width, width)
        self.up = nn.ModuleList([Stage(4 * width, width, width), Stage(2 * width, width, width)])
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        rates = torch.exp(-math.log(1000.0) * torch.arange(self.width // 2, device=time.device) / (self.width // 2))
        angles = time[:, None] * rates.to(time.dtype)
        when = torch.cat([angles.sin(), angles.cos()], dim=-1)
        kept, x = [], image
        for stage, pool in zip(self.down, self.pool, strict=True):
            kept.append(stage(x, when))
            x = pool(kept[-1])
        x = self.middle(x, when)
        for stage in self.up:
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), kept.pop()], dim=1), when)
        return self.last(x)


def unet(width: int = 8) -> nn.Module:
    return UNet(width)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)


class GroupedQueryAttention(nn.Module):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864, section 3.4) and heads that share keys and values (Ainslie et
    al. 2023, arXiv 2305.13245)."""

    def __init__(self, dim: int, heads: int, shared: int):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, shared, dim // heads
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, shared * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, shared * self.head_dim, bias=False)

    def rotated(self, x: Tensor) -> Tensor:
        half = self.head_dim // 2
        at = torch.arange(x.shape[2], device=x.device)[:, None]
        angles = at * 10000.0 ** (-torch.arange(half, device=x.device) / half)
        sine, cosine = angles.sin().to(x.dtype), angles.cos().to(x.dtype)
        one, other = x[..., :half], x[..., half:]
        return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query = self.q_proj(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        key = self.k_proj(x).view(batch, tokens, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        value = self.v_proj(x).view(batch, tokens, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        each = self.num_heads // self.num_key_value_heads
        key, value = self.rotated(key).repeat_interleave(each, dim=1), value.repeat_interleave(each, dim=1)
        mixed = attention(self.rotated(query), key, value, causal_mask(x))
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))


class LlamaBlock(nn.Module):
    """Touvron et al. 2023, arXiv 2302.13971, section 2.2, with grouped queries; the head is the embedding, tied."""

    def __init__(self, dim: int, heads: int, shared: int, hidden: int, words: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, dim), nn.Linear(dim, words, bias=False)
        self.head.weight = self.embed.weight
        self.norm1, self.attention = RMSNorm(dim), GroupedQueryAttention(dim, heads, shared)
        self.norm2, self.norm = RMSNorm(dim), RMSNorm(dim)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.norm1(x))
        inner = self.norm2(x)
        x = x + self.down(F.silu(self.gate(inner)) * self.up(inner))
        return self.head(self.norm(x))


def llama_block(dim: int = 32, heads: int = 4, shared: int = 2, hidden: int = 64, words: int = 64) -> nn.Module:
    return LlamaBlock(dim, heads, shared, hidden, words)


class Mixture(nn.Module):
    """Two of four experts for each token, chosen by a router that is not trained (Shazeer et al. 2017, arXiv
    1701.06538, section 2.1). Every expert runs on every token: what a small device does fastest, and what exports."""

    def __init__(self, dim: int, experts: int, chosen: int):
        super().__init__()
        self.chosen = chosen
        self.register_buffer("router", torch.randn(dim, experts))
        self.first, self.second = (nn.Parameter(torch.randn(experts, dim, dim) / math.sqrt(dim)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        scores = tokens @ self.router
        least = scores.topk(self.chosen, dim=-1).values[..., -1:]
        shares = scores.masked_fill(scores < least, -1e9).softmax(dim=-1)
        inner = F.relu(tokens[:, None] @ self.first) @ self.second  # (batch, experts, tokens, dim)
        return tokens + (inner * shares.transpose(1, 2)[..., None]).sum(dim=1)


def mixture(dim: int = 16, experts: int = 4, chosen: int = 2) -> nn.Module:
    return Mixture(dim, experts, chosen)
