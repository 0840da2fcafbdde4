"""The methods again: loops over tokens in float64, written from the papers' formulas and not from the code."""

import math
from fractions import Fraction

import numpy as np


def shares(count, weights, caps):
    """Largest remainder with caps: hand out one seat at a time to whom the exact share misses most."""
    parts, left = [0] * len(caps), min(count, sum(caps))
    open_ = set(range(len(caps)))
    while left:
        total = sum(Fraction(weights[i]) for i in open_)
        quota = {
            i: Fraction(weights[i]) * left / total if total else Fraction(caps[i]) * left / sum(caps[k] for k in open_)
            for i in open_
        }
        over = [i for i in open_ if quota[i] >= caps[i]]
        if over:
            for i in over:
                parts[i], left = caps[i], left - caps[i]
                open_.discard(i)
            continue
        for i in open_:
            parts[i] = math.floor(quota[i])
        rest = left - sum(parts[i] for i in open_)
        for i in sorted(open_, key=lambda i: (-(quota[i] - math.floor(quota[i])), i))[:rest]:
            parts[i] += 1
        left = 0
    return parts


def best(score, candidates, count):
    """The candidates with the highest scores, the lower index first among equals."""
    return sorted(candidates, key=lambda index: (-score[index], index))[:count]


def cosine(a, b):
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300))


class Image:
    """An image's numbers in float64, by flat index."""

    def __init__(self, features, scores, geometry):
        self.features = features.double().numpy().reshape(-1, features.shape[-1])
        self.attention = scores.attention.double().numpy().reshape(len(scores.attention), -1)
        self.keys = scores.keys.double().numpy().reshape(len(self.features), -1) if scores.keys is not None else None
        self.keys_by_head = scores.keys.double().numpy().reshape(len(self.features), *scores.keys.shape[-2:])
        self.relevance = scores.relevance.double().numpy().flatten()
        self.heads, self.layer = scores.heads, scores.feature_layer
        self.tokens = geometry.rows * geometry.columns
        valid = geometry.valid.flatten().tolist()
        self.of_view = [
            [i for i in range(v * self.tokens, (v + 1) * self.tokens) if valid[i]] for v in range(geometry.views)
        ]
        self.base, self.tiles = geometry.base, [v for v in range(geometry.views) if v != geometry.base]
        self.all = [i for view in self.of_view for i in view]
        self.score = self.attention[self.layer]

    def evenly_by_view(self, count):
        return shares(count, [1] * len(self.of_view), [len(view) for view in self.of_view])

    def base_and_tiles(self, alpha, count):
        first = min(math.floor(round(alpha * count, 9)), len(self.of_view[self.base]))
        first = max(first, count - sum(len(self.of_view[v]) for v in self.tiles))
        return first, count - first


def hired(image, geometry, count):
    """Algorithm 1: the tiles' shares are the attention of the base tokens under them."""
    first, rest = image.base_and_tiles(0.5, count)
    top, left, bottom, right = geometry.image
    masses = []
    for number in range(len(image.tiles)):
        row, column = divmod(number, geometry.tiles[1])
        mass = 0.0
        for token in range(image.tokens):
            y, x = divmod(token, geometry.columns)
            height, width = (bottom - top) / geometry.rows, (right - left) / geometry.columns
            y0, x0 = top + y * height, left + x * width
            inside = max(0.0, min(y0 + height, row + 1) - max(y0, row)) * max(
                0.0, min(x0 + width, column + 1) - max(x0, column)
            )
            mass += inside / (height * width) * image.attention[0][image.base * image.tokens + token]
        masses.append(mass)
    parts = [0] * len(image.of_view)
    parts[image.base] = first
    for view, part in zip(image.tiles, shares(rest, masses, [len(image.of_view[v]) for v in image.tiles]), strict=True):
        parts[view] = part
    return [i for view, part in enumerate(parts) for i in best(image.score, image.of_view[view], part)]


def fastervlm(image, geometry, count):
    parts = image.evenly_by_view(count)
    return [i for view, part in enumerate(parts) for i in best(image.score, image.of_view[view], part)]


def divprune(image, geometry, count):
    """Max-min distance, greedily; the first is the one whose nearest other token is farthest."""
    distance = {(a, b): 1 - cosine(image.features[a], image.features[b]) for a in image.all for b in image.all}
    kept = []
    while len(kept) < count:
        left = [i for i in image.all if i not in kept]
        others = {i: kept if kept else [k for k in image.all if k != i] for i in left}
        kept.append(min(left, key=lambda i: (-min(distance[i, k] for k in others[i]), i)))
    return kept


def scope(image, geometry, count):
    kept = []
    for view, part in enumerate(image.evenly_by_view(count)):
        group, own = image.of_view[view], []
        similar = {(a, b): cosine(image.features[a], image.features[b]) for a in group for b in group}

        def gain(i, own=own, group=group, similar=similar):
            covered = {k: max([0.0, *(similar[k, other] for other in own)]) for k in group}
            return sum(max(0.0, similar[k, i] - covered[k]) for k in group) * image.score[i]

        for _ in range(part):
            own.append(min((i for i in group if i not in own), key=lambda i: (-gain(i), i)))
        kept += own
    return kept


def cdpruner(image, geometry, count):
    """Greedily the token that makes the determinant of the kept tokens' kernel largest."""
    own = image.relevance[image.all]
    weight = (image.relevance - own.min()) / (own.max() - own.min()) + 1e-6
    unit = image.features / np.linalg.norm(image.features, axis=1, keepdims=True)
    kernel = weight[:, None] * (unit @ unit.T) * weight
    kept = []
    for view, part in enumerate(image.evenly_by_view(count)):
        chosen = []
        for _ in range(part):
            left = [i for i in image.of_view[view] if i not in chosen]
            chosen.append(max(left, key=lambda i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1]))
        kept += chosen
    return kept


def mean_attention(image, geometry, count):
    """The mean of the layers' shares of attention, times the distance to the nearest kept token of the group."""
    score = np.zeros(len(image.features))
    for layer in range(image.layer + 1):
        for view in image.of_view:
            total = sum(image.attention[layer][i] for i in view)
            for i in view:
                score[i] += image.attention[layer][i] / total / (image.layer + 1)
    first, rest = image.base_and_tiles(0.25, count)
    kept = []
    tiles = [i for view in image.tiles for i in image.of_view[view]]
    for group, part in ((image.of_view[image.base], first), (tiles, rest)):
        own = []
        for _ in range(part):
            left = [i for i in group if i not in own]

            def merit(i, own=own):
                nearest = min((max(0.0, 1 - cosine(image.features[i], image.features[k])) for k in own), default=1.0)
                return score[i] * nearest

            own.append(min(left, key=lambda i: (-merit(i), i)))
        kept += own
    return kept


def prumerge(image, geometry, count):
    """{kept: {token: weight}}: a kept token plus its 32 nearest by keys, weighted by their attention."""
    found = {}
    for view, part in enumerate(image.evenly_by_view(count)):
        group = image.of_view[view]
        for i in best(image.score, group, part):
            near = sorted((k for k in group if k != i), key=lambda k: (-cosine(image.keys[i], image.keys[k]), k))[:32]
            found[i] = {i: 1.0} | {k: image.score[k] / image.heads for k in near}
    return found


def visionzip(image, geometry, count):
    """{kept: {token: weight}}: dominant tokens, and contextual ones that are means of those nearest by keys."""
    keys = image.keys_by_head.mean(axis=1)
    found = {}
    for view, part in enumerate(image.evenly_by_view(count)):
        group = image.of_view[view]
        dominant = best(image.score, group, round(54 / 64 * part))
        rest = [i for i in group if i not in dominant]
        wanted = part - len(dominant)
        targets = rest[:: max(1, len(rest) // max(1, wanted))][:wanted]
        found |= {i: {i: 1.0} for i in dominant}
        merged = {target: [] for target in targets}
        for i in rest:
            if i not in targets and targets:
                merged[max(targets, key=lambda t: (cosine(keys[i], keys[t]), -targets.index(t)))].append(i)
        for target, others in merged.items():
            found[target] = {target: 1.0} | {i: 1 / len(others) for i in others}
    return found
