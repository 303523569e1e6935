"""Which GPUs of a cluster train, write and judge: a plan, by arithmetic alone.

Trainer ranks come first, filling node after node, so that those of one node are neighbours in
FSDP's mesh. Then vLLM's servers, which never lie across nodes: the verifier's, if there is one, and
one for answers on each group of `generator_gpus` that is left whole on a node.
"""

from collections.abc import Mapping
from typing import NamedTuple

from attending.errors import ConfigError
from attending.rl.recipe import ClusterConfig


class Place(NamedTuple):
    """GPUs of one node for one process or server; which of the node's, Ray says."""

    node: str
    """Its address."""
    gpus: int
    port: int
    """Of a server; of the trainers, their rendezvous'."""

    @property
    def address(self) -> str:
        """Of a server, as `sampler.address` and `judge` take it."""
        return f"http://{self.node}:{self.port}"


class Placement(NamedTuple):
    """Who is where."""

    trainers: tuple[Place, ...]
    """By rank."""
    verifier: Place | None
    generators: tuple[Place, ...]

    def environment(self, rank: int) -> dict[str, str]:
        """What torchrun would set for a trainer that sees its own GPU alone."""
        first = self.trainers[0]
        told = {"RANK": rank, "WORLD_SIZE": len(self.trainers), "LOCAL_RANK": 0}
        told |= {"LOCAL_WORLD_SIZE": 1}
        found = {name: str(value) for name, value in told.items()}
        return found | {"MASTER_ADDR": first.node, "MASTER_PORT": str(first.port)}


def plan(prompts: int, cluster: ClusterConfig, nodes: Mapping[str, int]) -> Placement:
    """Place the roles.

    Args:
        prompts: Of a step; the ranks share them evenly.
        cluster: How much a role takes.
        nodes: Address -> GPUs.

    Raises:
        ConfigError: There are too few GPUs, or the prompts cannot be dealt to the ranks.
    """
    ranks = cluster.trainers
    if prompts % ranks:
        raise ConfigError(f"prompts={prompts} cannot be dealt to cluster.trainers={ranks} ranks.")
    free, port = dict(nodes), cluster.port
    trainers = list[Place]()
    for node, count in nodes.items():
        own = min(count, ranks - len(trainers))
        trainers += [Place(node, 1, port)] * own
        free[node] -= own
    wanted, verifier = cluster.verifier_gpus, None
    fitting = [node for node in nodes if free[node] >= wanted > 0]
    if fitting:  # the node of which least is left
        node = min(fitting, key=free.__getitem__)
        verifier = Place(node, wanted, port + 1)
        free[node] -= wanted
    servers = list[Place]()
    for node in nodes:
        for _ in range(free[node] // cluster.generator_gpus):
            servers.append(Place(node, cluster.generator_gpus, port + 2 + len(servers)))
    if len(trainers) < ranks or not servers or (wanted and not verifier):
        raise ConfigError(
            f"{len(nodes)} nodes with {sum(nodes.values())} GPUs hold no {ranks} trainers, a "
            f"verifier of {cluster.verifier_gpus} GPUs and a server of {cluster.generator_gpus} on "
            "one node: lower cluster.trainers or verifier_gpus, or add nodes."
        )
    return Placement((*trainers,), verifier, (*servers,))
