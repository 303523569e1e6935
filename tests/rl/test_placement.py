"""Who is placed where, without a cluster."""

from typing import Any

import pytest

from attending.errors import ConfigError
from attending.rl.placement import Place, plan
from attending.rl.recipe import ClusterConfig


def test_trainers_first_and_servers_on_what_is_left_whole() -> None:
    cluster = ClusterConfig(trainers=3, generator_gpus=2, verifier_gpus=1, port=3000)
    found = plan(12, cluster, {"a": 4, "b": 5})
    assert found.trainers == (Place("a", 1, 3000),) * 3
    assert found.verifier == Place("a", 1, 3001)
    assert found.generators == (Place("b", 2, 3002), Place("b", 2, 3003))
    assert found.generators[1].address == "http://b:3003"


def test_a_node_too_small_for_the_verifier_still_writes() -> None:
    found = plan(8, ClusterConfig(verifier_gpus=8), {"a": 8, "b": 8})
    assert found.verifier is not None and found.verifier.node == "b"
    assert [one.node for one in found.generators] == ["a"] * 7


def test_ranks_of_a_second_node_meet_at_the_first() -> None:
    found = plan(12, ClusterConfig(trainers=6, port=3000), {"a": 4, "b": 4})
    assert [one.node for one in found.trainers] == ["a"] * 4 + ["b"] * 2
    assert found.environment(5) == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "3000",
    }
    assert [one.node for one in found.generators] == ["b", "b"] and found.verifier is None


def test_no_node_holds_more_than_it_has_and_no_port_is_given_twice() -> None:
    cluster = ClusterConfig(trainers=4, generator_gpus=2, verifier_gpus=3)
    nodes = {"a": 4, "b": 4, "c": 4, "none": 0}
    found = plan(12, cluster, nodes)
    assert found.verifier is not None
    servers = [found.verifier, *found.generators]
    for node, count in nodes.items():
        held = [one.gpus for one in (*found.trainers, *servers) if one.node == node]
        assert sum(held) <= count
    ports = [cluster.port, *(one.port for one in servers)]
    assert len({*ports}) == len(ports) and len(found.generators) == 2


@pytest.mark.parametrize(
    ("cluster", "nodes"),
    [
        ({"trainers": 8}, {"a": 8}),
        ({"trainers": 3, "generator_gpus": 2}, {"a": 2, "b": 2}),
        ({"trainers": 2, "verifier_gpus": 2}, {"a": 4}),
        ({"trainers": 5}, {"a": 8}),
        ({"trainers": 12}, {"a": 8}),
        ({}, {}),
    ],
)
def test_what_does_not_fit_is_told(cluster: dict[str, Any], nodes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.trainers"):
        plan(24, ClusterConfig(**cluster), nodes)
