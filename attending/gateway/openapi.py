"""The API's document, from the classes that check requests and the schemas of the answers."""

import json
from functools import cache
from importlib import metadata, resources
from typing import Any

from pydantic.json_schema import models_json_schema

from attending.engine.api import ChatRequest, CompletionRequest

REF = "#/components/schemas/{model}"


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1: `openapi.json` has the paths, the classes and `replies.json` the schemas."""
    text = (resources.files("attending.gateway") / "openapi.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    found["info"]["version"] = metadata.version("attending")
    _, requests = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")], ref_template=REF
    )
    replies = (resources.files("attending.engine") / "replies.json").read_text(encoding="utf-8")
    answers = json.loads(replies.replace("#/$defs/", REF.format(model="")))
    found["components"]["schemas"] |= requests["$defs"] | answers["$defs"]
    for methods in found["paths"].values():
        for operation in methods.values():
            codes = operation.pop("x-errors")
            answers = {code: {"$ref": f"#/components/responses/{code}"} for code in codes}
            operation["responses"] |= answers
    return found
