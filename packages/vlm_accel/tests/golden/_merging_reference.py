"""Float64 NumPy truth of the merge rules for one sample, with plain loops (iLLaVA 3.3, 3.4, 5, LightVLM 3.4).

Every function returns (tokens, kept, assign, matrix): matrix (M, N) with tokens = matrix @ x.
"""

import itertools
import math

import numpy as np


def order(scores):
    """Most important first; of equals the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def _result(x, kept, rows, assign):
    """Rows: output position -> {input row: weight}."""
    matrix = np.zeros((len(kept), len(x)))
    for out, sources in enumerate(rows):
        for source, weight in sources.items():
            matrix[out, source] = weight
    tokens = np.zeros((len(kept), x.shape[1]))
    for out in range(len(kept)):
        for source in range(len(x)):
            tokens[out] += matrix[out, source] * x[source]
    return tokens, np.array(kept), np.array(assign), matrix


def _plain(kept, n):
    rows = [{i: 1.0} for i in kept]
    assign = [kept.index(i) if i in kept else -1 for i in range(n)]
    return rows, assign


def drop(x, scores, keep):
    kept = sorted(order(scores)[:keep])
    rows, assign = _plain(kept, len(x))
    return _result(x, kept, rows, assign)


def rank1(x, scores, keep, weights="rank_desc"):
    n, r = len(x), len(x) - keep
    ascending = order(scores)[::-1]
    lowest = ascending[: r + 1]  # g_0 .. g_r
    kind = {
        "rank_desc": lambda t: r + 1 - t,
        "rank_asc": lambda t: t + 1,
        "uniform": lambda t: 1.0,
        "score": lambda t: scores[lowest[t]],
    }[weights]
    total = sum(kind(t) for t in range(r + 1))
    kept = [i for i in range(n) if i not in lowest[:r]]
    rows, assign = _plain(kept, n)
    here = kept.index(lowest[r])
    rows[here] = {g: kind(t) / total for t, g in enumerate(lowest)}
    for g in lowest:
        assign[g] = here
    return _result(x, kept, rows, assign)


def fuse(x, scores, keep):
    best = order(scores)
    kept = sorted(best[:keep])
    rows, assign = _plain(kept, len(x))
    here = kept.index(best[keep - 1])
    rows[here] = {j: scores[j] for j in best[keep - 1 :]}
    for j in best[keep - 1 :]:
        assign[j] = here
    return _result(x, kept, rows, assign)


def shift(x, keep):
    """One token at a time, as the released code does."""
    matrix = np.eye(len(x))
    while len(matrix) > keep:
        matrix = np.vstack([matrix[:-2], (matrix[-2] + matrix[-1]) / 2])
    assign = [min(i, keep - 1) for i in range(len(x))]
    return matrix @ x, np.arange(keep), np.array(assign), matrix


def recycle(x, scores, keep, pc_ratio=0.05, neighbours=5):
    n, width = x.shape
    best = order(scores)
    c = min(keep, max(1, round(pc_ratio * keep)))
    takers, rest = sorted(best[keep - c : keep]), sorted(best[keep:])
    kept = sorted(best[:keep])
    rows, assign = _plain(kept, n)
    largest = dict.fromkeys(rest, -1.0)
    for p in takers:
        similar = {j: float(x[p] @ x[j]) for j in rest}
        chosen = sorted(rest, key=lambda j: (-similar[j], j))[:neighbours]
        top = max(similar[j] for j in chosen)
        powers = {j: math.exp((similar[j] - top) / math.sqrt(width)) for j in chosen}
        total = sum(powers.values())
        rows[kept.index(p)] = {p: 0.5, **{j: powers[j] / total / 2 for j in chosen}}
        for j in chosen:
            if powers[j] / total > largest[j]:
                largest[j] = powers[j] / total
                assign[j] = kept.index(p)
    return _result(x, kept, rows, assign)


def assign(x, scores, keep, sizes, weights="size"):
    n = len(x)
    kept = sorted(order(scores)[:keep])
    rows, owner = _plain(kept, n)
    for j in range(n):
        if j not in kept:
            cosines = [x[j] @ x[p] / (np.linalg.norm(x[j]) * np.linalg.norm(x[p])) for p in kept]
            owner[j] = int(np.argmax(cosines))
    mass = [sizes[j] * (scores[j] if weights == "score" else 1.0) for j in range(n)]
    for out in range(keep):
        members = [j for j in range(n) if owner[j] == out]
        rows[out] = {j: mass[j] / sum(mass[m] for m in members) for j in members}
    return _result(x, kept, rows, owner)


def tome(x, keys, keep, sizes, prefix=0):
    """Matchings of even and odd positions until ``keep`` are left; clusters hold what was merged."""
    clusters = [[i] for i in range(len(x))]
    places = list(range(len(x)))
    metric = keys.mean(1)
    while len(clusters) > keep:
        n = len(clusters)
        means = [_mean(metric, sizes, cluster) for cluster in clusters]
        unit = [m / np.linalg.norm(m) for m in means]
        even = [i for i in range(n) if (i + prefix) % 2 == 0]
        odd = [i for i in range(n) if (i + prefix) % 2 == 1]
        edges = []
        for a in even:
            cosines = [float(unit[a] @ unit[b]) for b in odd]
            at = int(np.argmax(cosines))
            edges.append((-cosines[at], a, odd[at]))
        gone = set()
        for _, a, b in sorted(edges)[: min(n - keep, n // 2)]:
            clusters[b] = clusters[b] + clusters[a]
            gone.add(a)
        clusters = [c for i, c in enumerate(clusters) if i not in gone]
        places = [p for i, p in enumerate(places) if i not in gone]
    owner = [next(out for out, c in enumerate(clusters) if j in c) for j in range(len(x))]
    rows = [{j: sizes[j] / sum(sizes[m] for m in c) for j in c} for c in clusters]
    return _result(x, places, rows, owner)


def _mean(x, sizes, members):
    return sum(sizes[m] * x[m] for m in members) / sum(sizes[m] for m in members)


def pool_squares(x, grid, k):
    """Blocks of k x k of a complete grid, ceil mode, each at its upper left middle cell."""
    height, width = grid
    groups = []
    for top in range(0, height, k):
        for left in range(0, width, k):
            rows = range(top, min(top + k, height))
            columns = range(left, min(left + k, width))
            middle = rows[(len(rows) - 1) // 2] * width + columns[(len(columns) - 1) // 2]
            groups.append((middle, [r * width + c for r in rows for c in columns]))
    return _pooled(x, groups, np.ones(len(x)))


def pool_bins(x, keep, grid, index, sizes):
    """Strips of ranks from top to bottom, bins from left to right within a strip."""
    n = len(x)
    edges = [math.ceil(b * n / keep) for b in range(keep + 1)]
    if grid is None:
        return _pooled(x, [((e + f - 1) // 2, list(range(e, f))) for e, f in itertools.pairwise(edges)], sizes)
    height, width = grid
    strips = min(keep, max(1, round(math.sqrt(keep * height / width))))
    groups = []
    for strip in range(strips):
        bins = range(strip * keep // strips, (strip + 1) * keep // strips)
        members = list(range(edges[bins[0]], edges[bins[-1] + 1]))
        members.sort(key=lambda i: (index[i] % width, index[i] // width))
        offset = edges[bins[0]]
        for b in bins:
            mine = members[edges[b] - offset : edges[b + 1] - offset]
            groups.append((mine[(len(mine) - 1) // 2], mine))
    return _pooled(x, groups, sizes)


def _pooled(x, groups, sizes):
    groups = sorted(groups)
    kept = [middle for middle, _ in groups]
    owner = [next(out for out, (_, mine) in enumerate(groups) if j in mine) for j in range(len(x))]
    rows = [{j: sizes[j] / sum(sizes[m] for m in mine) for j in mine} for _, mine in groups]
    return _result(x, kept, rows, owner)
