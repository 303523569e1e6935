"""The API's document, from the classes that check requests and write answers."""

import json
from functools import cache
from importlib import metadata, resources
from typing import Any

from pydantic.json_schema import models_json_schema

from attending.engine.api import ChatRequest, CompletionRequest
from attending.engine.replies import ChatChunk, ChatCompletion, Completion, ModelCard, ModelList

CLASSES = (
    *(ChatRequest, CompletionRequest),
    *(ChatChunk, ChatCompletion, Completion, ModelCard, ModelList),
)
REF = "#/components/schemas/{model}"


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1: `openapi.json` has the paths, the classes have the schemas."""
    text = (resources.files("attending.gateway") / "openapi.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    found["info"]["version"] = metadata.version("attending")
    _, schemas = models_json_schema([(one, "validation") for one in CLASSES], ref_template=REF)
    found["components"]["schemas"] |= schemas["$defs"]
    for methods in found["paths"].values():
        for operation in methods.values():
            codes = operation.pop("x-errors")
            answers = {code: {"$ref": f"#/components/responses/{code}"} for code in codes}
            operation["responses"] |= answers
    return found
