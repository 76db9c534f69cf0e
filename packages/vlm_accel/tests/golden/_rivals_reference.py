"""The rival methods in float64 NumPy, one token at a time, written from the specifications.

Nothing here imports the package under test or torch. An image is x (N, D), attention (H, N), keys (N, H, d); every
function returns (rows x, kept).
"""

import math

import numpy as np


def unit(vector):
    return vector / np.sqrt((vector * vector).sum())


def cosine(a, b):
    return float(unit(a) @ unit(b))


def ranked(scores):
    """Indices by falling score, the lower index first on ties."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def in_order(pairs):
    """Rows and their positions by position."""
    pairs = sorted(pairs, key=lambda pair: pair[0])
    return np.stack([row for _, row in pairs]), [index for index, _ in pairs]


def dropped(x, kept):
    kept = sorted(kept)
    return x[kept], kept


# ---- after the encoder


def fastervlm(x, attention, count):
    return dropped(x, ranked(attention.mean(0))[:count])


def visionzip(x, attention, keys, dominant, contextual):
    order = ranked(attention.sum(0))
    first = set(order[:dominant])
    rest = [i for i in range(len(x)) if i not in first]
    step = max(1, len(rest) // contextual)
    targets = rest[::step][:contextual]
    metric = [unit(keys[i].mean(0)) for i in range(len(x))]
    joined = {target: [] for target in targets}
    for i in rest:
        if i in joined:
            continue
        best = targets[0]
        for target in targets:
            if metric[i] @ metric[target] > metric[i] @ metric[best]:
                best = target
        joined[best].append(i)
    pairs = [(i, x[i]) for i in first]
    for target, members in joined.items():
        pairs.append((target, x[target] + (sum(x[i] for i in members) / len(members) if members else 0)))
    return in_order(pairs)


def unsplit(keys, cls_query, cls_key):
    """Attention of the CLS row over all rows with heads joined; the patches' part."""
    width = cls_query.size
    query = cls_query.reshape(-1)
    logits = [] if cls_key is None else [query @ cls_key.reshape(-1) / math.sqrt(width)]
    logits += [query @ key.reshape(-1) / math.sqrt(width) for key in keys]
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    shares = [weight / sum(weights) for weight in weights]
    return np.array(shares[-len(keys) :])


def quartile(values, share):
    """Linear interpolation between order statistics."""
    values = sorted(values)
    at = share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def outliers(a):
    low, high = quartile(a, 0.25), quartile(a, 0.75)
    return max(1, sum(value > high + 1.5 * (high - low) for value in a))


def prumerge(x, keys, cls_query, cls_key, neighbours=32, plus=False):
    a = unsplit(keys, cls_query, cls_key)
    number = outliers(a)
    stay = set(ranked(a)[:number])
    if plus:
        ratio = number / len(x)
        stride = max(1, int(int(1 / ratio + 1e-9) / 3))
        stay |= set(np.arange(0, len(x) - 1, stride).tolist())
    flat = [key.reshape(-1) for key in keys]
    pairs = []
    for i in stay:
        others = [j for j in range(len(x)) if j != i]
        others.sort(key=lambda j: (-cosine(flat[i], flat[j]), j))
        pairs.append((i, x[i] + sum(a[j] * x[j] for j in others[:neighbours])))
    rest = [j for j in range(len(x)) if j not in stay]
    if rest:
        place = ranked([a[j] for j in rest])[0]
        pairs.append((rest[place], sum(a[j] * x[j] for j in rest)))
    return in_order(pairs)


def hired(features, first, last, grid, layout, ratio=0.2, base_share=0.5, voters=0.5):
    """features (1 + tiles, N, D), base first; attentions (1 + tiles, H, N). A list of (rows, kept)."""
    rows, n = features.shape[:2]
    budget = int(rows * n * ratio)
    base = min(int(base_share * budget), n)
    votes = [0] * (rows - 1)
    for patch in ranked(first[0].sum(0))[: int(voters * n)]:
        y, x = divmod(patch, grid[1])
        votes[(y * layout[0] // grid[0]) * layout[1] + x * layout[1] // grid[1]] += 1
    counts = [base] + [min(n, int(vote / sum(votes) * (budget - base) + 1e-9)) for vote in votes]
    return [dropped(features[row], ranked(last[row].sum(0))[:count]) for row, count in enumerate(counts)]


def vispruner(x, attention, count, step=8):
    order = ranked(attention.mean(0))
    important = order[: count // 2]
    left = order[count // 2 :]
    want = count - count // 2
    while len(left) > want:
        even, odd = left[0::2], left[1::2]
        nearest = [max(cosine(x[i], x[j]) for j in odd) for i in even]
        by_likeness = ranked(nearest)
        remove = min(step, len(left) - want, len(even))
        left = [even[place] for place in by_likeness[remove:]] + odd
    return dropped(x, important + left)


def divprune(x, count):
    n = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    second = [sorted(distance[i][j] for i in range(n) if i != j)[0] for j in range(n)]
    chosen = [ranked(second)[0]]
    while len(chosen) < count:
        best, most = None, -math.inf
        for j in range(n):
            if j not in chosen and min(distance[i][j] for i in chosen) > most:
                best, most = j, min(distance[i][j] for i in chosen)
        chosen.append(best)
    return dropped(x, chosen)


# ---- inside the decoder


def dpc_knn(x, clusters):
    """Centres and the nearest centre of each row."""
    n, width = x.shape
    distance = [[math.sqrt(((x[i] - x[j]) ** 2).sum()) / math.sqrt(width) for j in range(n)] for i in range(n)]
    rho = [math.exp(-sum(sorted(d * d for d in row)[:clusters]) / clusters) for row in distance]
    place = {i: p for p, i in enumerate(ranked(rho))}
    largest = max(max(row) for row in distance)
    delta = [min((distance[i][j] for j in range(n) if place[j] < place[i]), default=largest) for i in range(n)]
    centres = sorted(ranked([r * d for r, d in zip(rho, delta, strict=True)])[:clusters])
    owner = [i if i in centres else min(centres, key=lambda c: (distance[i][c], c)) for i in range(n)]
    return centres, owner


def sparsevlm(x, scores, stay):
    """Keep ``stay`` rows, cluster the best of the others; a cluster stands at its centre."""
    order = ranked(scores)
    deleted = len(x) - stay
    pool = min(deleted, int(0.3 * deleted) + 1)
    members = sorted(order[stay : stay + pool])
    made = int(pool / 10) + 1
    centres, owner = dpc_knn(x[members], made)
    pairs = [(i, x[i]) for i in order[:stay]]
    for centre in centres:
        mine = [members[i] for i in range(pool) if owner[i] == centre]
        pairs.append((members[centre], sum(x[i] for i in mine) / len(mine)))
    return in_order(pairs)


def raters(embeds, image, valid):
    """Indices of the text tokens that rate, of one sample."""
    last = max(i for i in range(len(image)) if image[i])
    text = [i for i in range(last + 1, len(image)) if valid[i]]
    patches = [i for i in range(len(image)) if image[i]]
    mean = dict.fromkeys(text, 0.0)
    for p in patches:
        logits = [embeds[p] @ embeds[t] for t in text]
        weights = [math.exp(value - max(logits)) for value in logits]
        for t, weight in zip(text, weights, strict=True):
            mean[t] += weight / sum(weights) / len(patches)
    level = sum(mean.values()) / len(text)
    return [t for t in text if mean[t] > level]


def pact_importance(queries, keys, x, image):
    """queries (H, t, d), keys (K, t, d), x (t, D) of one sample; 0 outside the image."""
    heads, groups = len(queries), len(queries) // len(keys)
    patches = [i for i in range(len(image)) if image[i]]
    score = np.zeros(len(image))
    for h in range(heads):
        mean = sum(queries[h, i] for i in patches) / len(patches)
        logits = np.array([mean @ keys[h // groups, j] / math.sqrt(len(mean)) for j in patches])
        weights = np.exp(logits - logits.max())
        score[patches] += weights / weights.sum() / heads
    return score * np.sqrt((x * x).sum(1))


def pact(x, keys, scores, count, stay=0.55, cutoff=0.21, join=1.5):
    """Prune, choose exactly ``count`` centres by density, join, average. keys (N, d)."""
    n = len(x)
    top = sorted(ranked(scores)[: max(count, round(n * stay))])
    far = {(i, j): 0.0 if i == j else max(0.0, 1 - cosine(keys[i], keys[j])) for i in range(n) for j in range(n)}
    rho = {i: sum(math.exp(-((far[i, j] / 2) ** 2)) for j in top) for i in top}
    centres = []
    while len(centres) < count:
        free = [i for i in top if i not in centres]
        apart = [i for i in free if all(far[i, c] > cutoff for c in centres)]
        if apart:
            centres.append(min(apart, key=lambda i: (-rho[i], i)))
        else:
            centres.append(min(free, key=lambda i: (-min(far[i, c] for c in centres), i)))
    members = {c: [c] for c in centres}
    for i in range(n):
        if i in centres:
            continue
        nearest = min(sorted(centres), key=lambda c: far[i, c])
        if far[i, nearest] <= join * cutoff:
            members[nearest].append(i)
    rows, kept = in_order([(c, sum(x[i] for i in mine) / len(mine)) for c, mine in members.items()])
    return rows, kept, [len(members[c]) for c in kept]
