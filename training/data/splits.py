"""Who trains, who validates, and how many tiles each slide gives: pure functions of names.

Splits never divide a patient. Sites stay whole where a project has enough of them, because a site
signs its slides (stain, scanner, optics), and a model validated on sites it has seen looks better
than it is: Howard et al. (2021), Nature Communications 12:4423.

Quotas follow the tissue source sites and grow monotonically: the tiles of a larger set include
those of a smaller one. The usual largest-remainder rule does not have that property (the Alabama
paradox), so places go by Webster's divisors, which do. What is kept apart from training does not
depend on quotas, so no larger set trains on what a smaller one kept apart. Nothing here reads a
file or draws a random number; every choice is a hash of names and a seed.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

QuotaBy = Literal["slides", "tissue"]
UNSEEN = "unseen"  # split of tiles that are kept apart, of slides that are trained on

_RESTARTS = 20


class Member(NamedTuple):
    """What decides a slide's split; `site` and `project` are "" where unknown."""

    slide: str
    patient: str
    site: str = ""
    project: str = ""


class Assignment(NamedTuple):
    """The split of every slide, and the sites that had to be divided, as "project/site"."""

    splits: dict[str, str]
    divided_sites: tuple[str, ...]


def assign_splits(
    members: Sequence[Member],
    shares: Sequence[tuple[str, float]],
    seed: int,
    *,
    keep_sites: bool = True,
) -> Assignment:
    """Divide patients among splits, project by project, near the given shares of slides.

    A project with fewer sites than splits cannot keep its sites whole; its patients are divided
    and its sites reported. Within a project groups go, in several orders, each to the split that
    lacks most; then single groups move as long as that helps, and the best order wins.

    Args:
        members: One a slide; the order does not matter.
        shares: Name and share of each split; shares add up to 1.
        seed: Chooses among equally good divisions.
        keep_sites: Whether to keep sites whole.

    Raises:
        ValueError: The shares are not positive or do not add up to 1.
    """
    if any(share <= 0 for _, share in shares) or abs(sum(s for _, s in shares) - 1) > 1e-6:
        raise ValueError(f"split shares are {dict(shares)}, expected positive shares that add to 1")
    sites: dict[str, set[str]] = defaultdict(set)
    for member in members:
        if member.site:
            sites[member.project].add(member.site)
    whole = {p for p, names in sites.items() if keep_sites and len(names) >= len(shares)}
    by_project: dict[str, list[list[Member]]] = defaultdict(list)
    for group in _groups(members, whole):
        by_project[min(m.project for m in group)].append(group)
    splits: dict[str, str] = {}
    for project in sorted(by_project):
        groups = by_project[project]
        for group, split in zip(groups, _divide(groups, shares, seed), strict=True):
            splits |= {member.slide: split for member in group}
    seen: dict[str, set[str]] = defaultdict(set)
    for m in members:
        if m.site:
            seen[f"{m.project}/{m.site}"].add(splits[m.slide])
    return Assignment(splits, tuple(sorted(s for s, found in seen.items() if len(found) > 1)))


def check_leakage(
    members: Iterable[Member], splits: Mapping[str, str], identities: Mapping[str, str]
) -> None:
    """Refuse splits that share a patient, or a slide under two names.

    Args:
        members: One a slide.
        splits: Split of each slide.
        identities: Hash of each slide's content; "" or absent where unknown.

    Raises:
        ValueError: Names up to five of what leaks, and the slides.
    """
    slides: dict[tuple[str, str], list[str]] = defaultdict(list)
    for member in members:
        slides["patient", member.patient].append(member.slide)
        if identities.get(member.slide):
            slides["content", identities[member.slide]].append(member.slide)
    leaks = []
    for (kind, key), names in sorted(slides.items()):
        named = sorted({splits[name] for name in names})
        if len(named) > 1:
            what = f"patient {key}" if kind == "patient" else "one slide under several names"
            leaks.append(f"{what} is in {' and '.join(named)}: {', '.join(sorted(names)[:4])}")
    if leaks:
        raise ValueError(
            f"{len(leaks)} leaks between splits, such as {'; '.join(leaks[:5])}. "
            "Give them one split, or one patient, in --slides-csv, or remove the copies"
        )


def count_by_split(
    members: Iterable[Member], splits: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Return the number of slides, patients and sites of each split."""
    groups: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        groups[splits[member.slide]].append(member)
    return {
        split: {
            "slides": len(rows),
            "patients": len(Counter(m.patient for m in rows)),
            "sites": len({(m.project, m.site) for m in rows}),
        }
        for split, rows in sorted(groups.items())
    }


def slide_quotas(
    total: int | None,
    capacities: Mapping[str, int],
    sites: Mapping[str, str],
    by: QuotaBy = "slides",
) -> dict[str, int]:
    """Return how many tiles each slide gives, so that sites contribute by their size.

    Sites share the total by their number of slides (or of tissue tiles), slides of a site share
    evenly; what a slide or site cannot give, the others do.

    Args:
        total: Tiles wanted; None for all.
        capacities: Tiles with tissue of each slide; 0 for one that cannot be read.
        sites: Site of each slide, the same keys.
        by: What makes a site large.

    Returns:
        Quotas that add up to the smaller of `total` and all capacities. With a larger `total` no
        quota is smaller.
    """
    if total is None or total >= sum(capacities.values()):
        return dict(capacities)
    slides: dict[str, list[str]] = defaultdict(list)
    for slide in sorted(capacities):
        slides[sites[slide]].append(slide)
    room = {site: sum(capacities[s] for s in names) for site, names in slides.items()}
    weights = {s: len(names) for s, names in slides.items()} if by == "slides" else room
    quotas: dict[str, int] = {}
    for site, quota in apportion(total, weights, room).items():
        names = slides[site]
        even = dict.fromkeys(names, 1)
        quotas |= apportion(quota, even, {name: capacities[name] for name in names})
    return quotas


def apportion(
    total: int, weights: Mapping[str, int], capacities: Mapping[str, int]
) -> dict[str, int]:
    """Divide whole places by weight, none above its capacity; more places never take one away.

    The k-th place of a name has the priority weight / (2k - 1), ties going by name; the first
    `total` places are taken. Bisection finds all but the last few, a heap the rest.

    Source: Balinski and Young (1982), Fair Representation, on Webster's method.
    """
    total = min(total, sum(capacities[n] for n in weights if weights[n] > 0))
    names = sorted(n for n in weights if weights[n] > 0)
    weight = np.array([weights[n] for n in names], np.float64)
    room = np.array([capacities[n] for n in names], np.int64)

    def places(priority: float) -> np.ndarray:
        return np.minimum(room, np.floor(weight / (2 * priority) + 0.5).astype(np.int64))

    low, high = 0.25 / (1 + room.max(initial=0)), float(weight.max(initial=0.0)) + 1
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if places(middle).sum() <= total else (middle, high)
    given = places(high * (1 + 1e-9))  # a hair fewer: the heap decides what rounding might not
    queue = [(-w / (2 * k + 1), i) for i, (w, k) in enumerate(zip(weight, given, strict=True))]
    heapq.heapify(queue)
    left = total - int(given.sum())
    while left > 0:
        _, i = heapq.heappop(queue)
        if given[i] < room[i]:
            given[i] += 1
            left -= 1
            heapq.heappush(queue, (-weight[i] / (2 * given[i] + 1), i))
    return dict.fromkeys(weights, 0) | dict(zip(names, given.tolist(), strict=True))


def rank(keys: Iterable[str], seed: int) -> np.ndarray:
    """Return the order in which to take keys: by SHA-256 of seed and key, int64 [N]."""
    return np.argsort(_hashes(keys, seed)[:, 0], kind="stable")


def keep_apart(keys: Iterable[str], seed: int, share: float) -> np.ndarray:
    """Return which keys are kept apart, about a share of them whatever their rank: bool [N]."""
    return _hashes(keys, seed)[:, 1] < share * 2.0**64


def _hashes(keys: Iterable[str], seed: int) -> np.ndarray:
    """Return the SHA-256 of seed and key as four independent numbers, uint64 [N, 4]."""
    hashes = [hashlib.sha256(f"{seed}/{key}".encode()).digest() for key in keys]
    return np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 4)


def _groups(members: Sequence[Member], whole: set[str]) -> list[list[Member]]:
    """Return what must stay together: patients, joined by the sites of projects in `whole`."""
    parent: dict[tuple[str, ...], tuple[str, ...]] = {}

    def root(node: tuple[str, ...]) -> tuple[str, ...]:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for m in members:
        patient = root(("patient", m.patient))
        if m.site and m.project in whole:
            parent[patient] = root(("site", m.project, m.site))
    groups: dict[tuple[str, ...], list[Member]] = defaultdict(list)
    for m in sorted(members):
        groups[root(("patient", m.patient))].append(m)
    return list(groups.values())


def _divide(
    groups: list[list[Member]], shares: Sequence[tuple[str, float]], seed: int
) -> list[str]:
    """Return a split for each group, with sizes nearest to the shares."""
    sizes = [len(group) for group in groups]
    targets = np.array([share for _, share in shares]) * sum(sizes)
    best: tuple[float, list[int]] | None = None
    for restart in range(_RESTARTS):
        order = rank((f"{restart}/{group[0].slide}" for group in groups), seed).tolist()
        if restart == 0:
            order.sort(key=lambda i: -sizes[i])
        choice = _settle(order, sizes, targets)
        filled = np.bincount(choice, weights=sizes, minlength=len(shares))
        error = float(((filled - targets) ** 2).sum())
        if best is None or error < best[0] - 1e-9:
            best = (error, choice)
    assert best is not None
    return [shares[k][0] for k in best[1]]


def _settle(order: list[int], sizes: list[int], targets: np.ndarray) -> list[int]:
    lack = targets.astype(np.float64).tolist()
    choice = [0] * len(sizes)
    for i in order:
        choice[i] = max(range(len(lack)), key=lack.__getitem__)
        lack[choice[i]] -= sizes[i]
    is_better = True
    while is_better:
        is_better = False
        for i in order:
            here, size = choice[i], sizes[i]
            there = max(range(len(lack)), key=lack.__getitem__)
            # Moving changes the squared error by 2 size (size + lack[here] - lack[there]).
            if there != here and size + lack[here] - lack[there] < -1e-9:
                choice[i] = there
                lack[here] += size
                lack[there] -= size
                is_better = True
    return choice
