"""Deaths of ranks and nodes: whom they hit and for how long; and where requests go meanwhile."""

from pathlib import Path

import numpy as np
import pytest

from saqqara.cluster.simulation.faults import (
    Fault,
    FaultRates,
    Outage,
    Placement,
    outages,
    read_faults,
)
from saqqara.cluster.simulation.routing import route

SMALL = Placement(tensor=4, pipeline=1, replicas=4, gpus_per_node=8)
WIDE = Placement(tensor=2, pipeline=3, replicas=4, gpus_per_node=8)  # stages over nodes


def test_a_node_has_whole_tensor_groups_of_one_or_more_replicas() -> None:
    assert (SMALL.num_gpus, SMALL.num_nodes) == (16, 2)
    assert [list(SMALL.replicas_on(node)) for node in range(2)] == [[0, 1], [2, 3]]
    assert [SMALL.replica_of(rank) for rank in (0, 3, 4, 15)] == [0, 0, 1, 3]
    # Groups 0-3 lie on node 0: three stages of replica 0, and one of replica 1.
    assert [list(WIDE.replicas_on(node)) for node in range(3)] == [[0, 1], [1, 2], [2, 3]]


def test_a_dead_rank_costs_its_replica_and_a_dead_node_all_that_lie_on_it() -> None:
    faults = [Fault(10.0, "rank", 5), Fault(100.0, "node", 1, back_after_seconds=300.0)]
    assert outages(faults, SMALL, detect_seconds=2.0, restart_seconds=60.0) == [
        [],
        [Outage(10.0, 72.0, "rank")],
        [Outage(100.0, 460.0, "node")],
        [Outage(100.0, 460.0, "node")],
    ]


def test_a_death_during_an_outage_makes_it_longer() -> None:
    faults = [Fault(40.0, "rank", 1), Fault(10.0, "rank", 0), Fault(103.0, "rank", 0)]
    found = outages(faults, SMALL, detect_seconds=2.0, restart_seconds=60.0)
    assert found[0] == [Outage(10.0, 102.0, "rank"), Outage(103.0, 165.0, "rank")]


def test_rates_give_the_faults_that_they_say() -> None:
    rates = FaultRates(rank_mtbf_hours=2.0, node_mtbf_hours=4.0, node_return_seconds=7.0)
    faults = rates.draw(SMALL, seconds=3600 * 200, seed=1)
    ranks = [f for f in faults if f.cause == "rank"]
    nodes = [f for f in faults if f.cause == "node"]
    assert len(ranks) == pytest.approx(16 * 200 / 2, rel=0.1)
    assert len(nodes) == pytest.approx(2 * 200 / 4, rel=0.3)
    assert {f.number for f in ranks} == set(range(16))
    assert {f.back_after_seconds for f in nodes} == {7.0}
    assert faults == rates.draw(SMALL, 3600 * 200, seed=1) != rates.draw(SMALL, 3600 * 200, seed=2)
    assert FaultRates().draw(SMALL, 3600.0, seed=1) == []


def test_a_schedule_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "faults.jsonl"
    file.write_text(
        '{"seconds": 5, "rank": 3}\n\n{"seconds": 7.5, "node": 1, "back_after_seconds": 60}\n',
        encoding="utf-8-sig",  # with a byte order mark
    )
    assert read_faults(file, SMALL) == [Fault(5.0, "rank", 3), Fault(7.5, "node", 1, 60.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "faults: line 1 of .* is no JSON"),
        ("[" * 100_000, "line 1 of .* is no JSON: recursion limit"),
        ('{"seconds": 1, "rank": 0, "rank": 1}', "line 1 of .*: 'rank' is there twice"),
        ('{"seconds": 1%s, "rank": 0}' % ("0" * 400), "line 1 .*seconds must be .* an integer of"),
        (
            '{"seconds": 1, "rank": 1%s}' % ("0" * 400),
            "line 1 .*rank must be one of .* an integer of",
        ),
        ('{"rank": 5}', "line 1 of .* needs seconds"),
        ('{"seconds": 5}', "needs seconds, and rank or node"),
        ('{"seconds": 5, "rank": 1, "node": 1}', "needs seconds, and rank or node"),
        ('{"seconds": 5, "rank": 16}', "rank must be one of 0 to 15, not 16"),
        ('{"seconds": 5, "node": 2}', "node must be one of 0 to 1, not 2"),
        ('{"seconds": -5, "node": 1}', "seconds must be a number from 0 to 1e"),
        ('{"seconds": 5, "rank": 1, "back_after_seconds": 2}', "is for nodes"),
        ('{"seconds": 5, "rank": 1, "back": 2}', "has 'back', which is none of"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "faults.jsonl"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_faults(file, SMALL)


def test_a_request_goes_where_least_work_is_left() -> None:
    seconds = np.array([0.0, 0.0, 0.0, 1.0, 1.5, 9.0])
    work = np.array([4.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    # At 1.5 the replicas are done at 4, 2 and 2; at 9 all are idle, and 1 has been the longest.
    assert route(seconds, work, [[], [], []]).tolist() == [0, 1, 2, 1, 1, 2]


def test_a_replica_that_is_down_gets_nothing_while_others_are_sooner_done() -> None:
    seconds = np.arange(20.0)
    down = [[Outage(5.0, 12.0, "rank")], []]
    routed = route(seconds, np.full(20, 0.5), down)
    assert set(routed[5:12]) == {1}
    assert {0, 1} <= set(routed[:5])
    assert {0, 1} <= set(routed[12:])
    long_work = route(seconds, np.full(20, 30.0), down)  # who is busy is no better than who is down
    assert abs((long_work == 0).sum() - 10) <= 1
