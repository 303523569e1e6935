"""The document tells the truth: a machine that reads it finds nothing else."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from attending.gateway import app as gateway_app
from attending.gateway.house import House
from attending.gateway.keys import Keys
from attending.gateway.openapi import document
from attending.gateway.upstream import Upstream
from tests.gateway import fake
from tests.running import running

CHECKS = list(HealthCheck)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    keys = Keys(tmp_path_factory.mktemp("keys"))
    headers = {"Authorization": f"Bearer {keys.add('test')}", "Host": "localhost"}
    with running(fake.app()) as address:
        house = House(keys, Upstream(f"{address}/v1", is_engine=True))
        house.status.phase = "ready"
        config = schemathesis.Config.from_dict({"headers": headers})
        app = gateway_app.build(house)
        yield schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=headers)


def plain(value: Any) -> Any:
    """5.0 is an integer to JSON Schema, but not to who reads strictly: send it as 5."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


PATHS = sorted((path, method) for path, node in document()["paths"].items() for method in node)


@pytest.mark.parametrize(("path", "method"), PATHS)
def test_every_answer_is_as_the_document_says(api: Any, path: str, method: str) -> None:
    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=CHECKS)
    @given(api[path][method].as_strategy())
    def check(case: Any) -> None:
        case.body = plain(case.body)
        case.call_and_validate()

    check()


def test_every_reference_leads_somewhere_and_every_route_is_there() -> None:
    found = document()

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            node = list(node.values())
        if isinstance(node, list):
            for one in node:
                yield from references(one)

    for reference in set(references(found)):
        place = found
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    assert len(found["paths"]) == 8
    assert {"ChatRequest", "ChatCompletion", "ChatChunk", "Error"} <= set(
        found["components"]["schemas"]
    )
    assert found is document()
    assert "x-errors" not in str(found)
