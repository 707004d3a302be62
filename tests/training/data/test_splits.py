from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.splits import (
    Member,
    apportion,
    assign_splits,
    check_leakage,
    keep_apart,
    rank,
    slide_quotas,
)

SHARES = (("train", 0.9), ("val", 0.05), ("test", 0.05))
HALVES = (("train", 0.5), ("val", 0.5))


def members_of(draws):
    """Slides with patients, sites and projects; a site belongs to one project."""
    return [
        Member(f"s{k}", f"p{patient}", f"t{site}", f"project{site % 2}")
        for k, (patient, site) in enumerate(draws)
    ]


many_members = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 7)), min_size=1, max_size=60)
some_sites = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.tuples(st.integers(1, 40), st.integers(0, 300)),
    min_size=1,
)


@settings(deadline=None)
@given(many_members, st.integers(0, 3))
def test_no_patient_is_in_two_splits(draws, seed):
    members = members_of(draws)
    splits = assign_splits(members, SHARES, seed).splits
    assert set(splits) == {m.slide for m in members}
    found = defaultdict(set)
    for member in members:
        found[member.patient].add(splits[member.slide])
    assert all(len(names) == 1 for names in found.values())
    check_leakage(members, splits, {})


@settings(deadline=None)
@given(many_members, st.randoms())
def test_splits_do_not_depend_on_the_order_of_slides(draws, random):
    members = members_of(draws)
    shuffled = list(members)
    random.shuffle(shuffled)
    assert assign_splits(members, SHARES, 0) == assign_splits(shuffled, SHARES, 0)


def test_sites_stay_whole_where_a_project_has_enough_of_them():
    members = [Member(f"{t}{k}", f"{t}{k}", f"t{t}", "p") for t in range(20) for k in range(t + 1)]
    found = assign_splits(members, SHARES, 0)
    assert not found.divided_sites
    by_site = defaultdict(set)
    for m in members:
        by_site[m.site].add(found.splits[m.slide])
    assert all(len(s) == 1 for s in by_site.values())
    sizes = Counter(found.splits.values())
    for name, share in SHARES:
        assert sizes[name] / len(members) == pytest.approx(share, abs=0.01)


def test_a_project_of_one_site_is_divided_by_patient_and_the_site_is_reported():
    members = [Member(f"s{k}", f"p{k // 2}", "t0", "ACC") for k in range(40)]
    found = assign_splits(members, HALVES, 0)
    assert found.divided_sites == ("ACC/t0",)
    assert Counter(found.splits.values()) == {"train": 20, "val": 20}


def test_slides_of_unknown_site_are_not_one_site():
    members = [Member(f"s{k}", f"p{k}") for k in range(10)]
    assert Counter(assign_splits(members, HALVES, 0).splits.values()) == {"train": 5, "val": 5}


def test_shares_must_add_up():
    with pytest.raises(ValueError, match="expected positive shares that add to 1"):
        assign_splits([], (("train", 0.9), ("val", 0.2)), 0)


def test_leaks_of_patients_and_of_copies_are_named():
    members = [Member("a", "p1"), Member("b", "p1"), Member("c", "p2"), Member("d", "p3")]
    splits = {"a": "train", "b": "val", "c": "train", "d": "val"}
    with pytest.raises(ValueError, match=r"2 leaks.*one slide.*c, d.*patient p1 is in train and v"):
        check_leakage(members, splits, {"c": "same", "d": "same", "a": ""})


@settings(deadline=None)
@given(some_sites, st.integers(0, 500), st.integers(0, 50))
def test_places_add_up_and_more_places_take_none_away(sites, total, more):
    weights = {name: weight for name, (weight, _) in sites.items()}
    rooms = {name: room for name, (_, room) in sites.items()}
    small, large = (apportion(n, weights, rooms) for n in (total, total + more))
    assert sum(small.values()) == min(total, sum(rooms.values()))
    assert all(small[n] <= large[n] <= rooms[n] for n in sites)


def test_places_follow_weights_to_within_one():
    weights = {"a": 343, "b": 295, "c": 7, "d": 1}
    rooms = dict.fromkeys(weights, 10**9)
    places = apportion(40_000_000, weights, rooms)
    for name, weight in weights.items():
        assert abs(places[name] - 40_000_000 * weight / 646) < 1


def test_no_alabama_paradox():
    """By largest remainders, c would get 2 of 10 places and only 1 of 11."""
    weights, rooms = {"a": 6, "b": 6, "c": 2}, dict.fromkeys("abc", 99)
    assert apportion(11, weights, rooms)["c"] >= apportion(10, weights, rooms)["c"]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 200),
    st.integers(0, 100),
    st.sampled_from(["slides", "tissue"]),
)
def test_the_tiles_of_a_larger_set_include_those_of_a_smaller_one(slides, total, more, by):
    capacities = {f"s{k}": capacity for k, (_, capacity) in enumerate(slides)}
    sites = {f"s{k}": f"t{site}" for k, (site, _) in enumerate(slides)}

    def tiles(num):
        quotas = slide_quotas(num, capacities, sites, by)
        return {
            (slide, int(tile))
            for slide, quota in quotas.items()
            for tile in rank((f"{slide}/{k}" for k in range(capacities[slide])), 0)[:quota]
        }

    small, large = tiles(total), tiles(total + more)
    assert len(small) == min(total, sum(capacities.values()))
    assert small <= large


def test_sites_share_by_size_and_what_one_lacks_the_others_give():
    capacities = {"a1": 100, "a2": 100, "a3": 100, "b1": 100, "c1": 5}
    sites = {name: name[0] for name in capacities}
    quotas = slide_quotas(50, capacities, sites)
    # By slides 30, 10 and 10; c has 5 only, which go to a and b as 3 to 1.
    assert quotas == {"a1": 12, "a2": 11, "a3": 11, "b1": 11, "c1": 5}


def test_ranks_depend_on_seed_and_key_only():
    keys = [f"{k}" for k in range(50)]
    order = rank(keys, 0)
    assert sorted(order.tolist()) == list(range(50))
    assert [keys[i] for i in order] == [keys[::-1][i] for i in rank(keys[::-1], 0)]
    assert order.tolist() != rank(keys, 1).tolist()


def test_a_share_is_kept_apart_whatever_its_rank():
    keys = [f"{k}" for k in range(4000)]
    tenth, fifth = (keep_apart(keys, 0, share) for share in (0.1, 0.2))
    assert tenth.mean() == pytest.approx(0.1, abs=0.02)  # four standard errors
    assert fifth[tenth].all()
    assert tenth[rank(keys, 0)[:1000]].mean() == pytest.approx(0.1, abs=0.04)
    assert keep_apart(keys[::-1], 0, 0.1).tolist() == tenth[::-1].tolist()
    assert not keep_apart(keys, 0, 0.0).any()
