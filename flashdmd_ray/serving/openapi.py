"""OpenAPI document of the requests and answers that are possible now, with the models that are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from flashdmd_ray.serving.errors import ERRORS
from flashdmd_ray.serving.messages import ModelInfo
from flashdmd_ray.serving.request_schema import request_schema
from flashdmd_ray.serving.settings import ServeSettings

_REQUEST_ID = {"description": "Id of this request, for the operator's log.", "schema": {"type": "string"}}
_RETRY_AFTER = {
    "description": "Seconds to wait.",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9]+$"},
}


def describe_api(models: Sequence[ModelInfo], settings: ServeSettings, needs_key: bool) -> dict[str, Any]:
    """Return the document as a JSON tree. needs_key: whether the service has keys."""
    paths = {
        "/v1/images/generations": {"post": _generate(models, settings)},
        "/v1/models": {"get": _get("listModels", "The models that can be asked for", "ModelList")},
        "/v1/models/{model}": {"get": _get_model(models)},
        "/metrics": {"get": _metrics()},
        "/healthz": {"get": _open(_get("health", "200 when images can be drawn", "Health"))},
        "/openapi.json": {"get": _open(_get("openapi", "This document", "Document"))},
    }
    absent = "403" if needs_key else "401"  # one of both: the service has keys, or is private
    for path in paths.values():
        for operation in path.values():
            operation["responses"].pop(absent, None)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "flashdmd_ray images",
            "version": metadata.version("flashdmd-ray"),
            "description": "Few-step image generation, compatible with OpenAI's images API. Errors have OpenAI's shape.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}] if needs_key else [],
    }


def _generate(models: Sequence[ModelInfo], settings: ServeSettings) -> dict[str, Any]:
    schema = request_schema(models, settings.default_model, settings.limits)
    return {
        "operationId": "createImage",
        "summary": "Draw images of a prompt",
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": _responses("ImagesResponse", (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)),
    }


def _get(operation: str, summary: str, schema: str, errors: Sequence[int] = (401, 403, 500, 503)) -> dict[str, Any]:
    return {"operationId": operation, "summary": summary, "responses": _responses(schema, errors)}


def _get_model(models: Sequence[ModelInfo]) -> dict[str, Any]:
    names = [name for model in models for name in (model.name, *model.aliases)]
    parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": names}}
    operation = _get("getModel", "One model, by name or alias", "Model", (401, 403, 404, 500, 503))
    return operation | {"parameters": [parameter]}


def _metrics() -> dict[str, Any]:
    operation = _get("metrics", "Figures for Prometheus", "Health")
    operation["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return operation


def _open(operation: Mapping[str, Any]) -> dict[str, Any]:
    """Mark an operation that needs no key."""
    responses = {status: text for status, text in operation["responses"].items() if status not in ("401", "403")}
    return {**operation, "responses": responses, "security": []}


def _responses(schema: str, errors: Sequence[int]) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": _response("Success.", schema)}
    for status in errors:
        responses[str(status)] = _response(ERRORS[status], "Error")
    if "429" in responses:
        responses["429"]["headers"]["Retry-After"] = _RETRY_AFTER
    return responses


def _response(description: str, schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "headers": {"X-Request-Id": _REQUEST_ID}, "content": content}


def _object(properties: Mapping[str, Any], optional: Sequence[str] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required, "additionalProperties": False}


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_SECONDS = {"type": "number", "minimum": 0}
_SIZE = {"type": "string", "pattern": "^[0-9]+x[0-9]+$"}
_NULLABLE_TEXT = {"type": ["string", "null"]}

SCHEMAS: Mapping[str, Any] = {
    "ImagesResponse": _object(
        {
            "created": _COUNT,
            "data": {
                "type": "array",
                "minItems": 1,
                "items": _object({"b64_json": {"type": "string", "contentEncoding": "base64"}, "seed": _COUNT}),
            },
            "output_format": {"enum": ["png", "webp", "jpeg"]},
            "size": _SIZE,
            "model": _TEXT,
            "version": _TEXT,
            "num_inference_steps": {"type": "integer", "minimum": 1},
            "timing": _object(
                {
                    "queue_seconds": _SECONDS,
                    "draw_seconds": _SECONDS,
                    "total_seconds": _SECONDS,
                    "seconds_per_image": _SECONDS,
                    "batch": {"type": "integer", "minimum": 1},
                }
            ),
        }
    ),
    "Model": _object(
        {
            "id": _TEXT,
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _TEXT,
            "version": _TEXT,
            "kind": {"enum": ["student", "teacher"]},
            "base": _TEXT,
            "aliases": {"type": "array", "items": _TEXT},
            "examples": {"type": "array", "items": _TEXT},
            "sizes": {"type": "array", "items": _SIZE, "minItems": 1},
            "num_inference_steps": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
            "default_num_inference_steps": {"type": "integer", "minimum": 1},
            "guidance_scale": {"type": ["number", "null"]},
            "refused": _NULLABLE_TEXT,
        }
    ),
    "ModelList": _object(
        {"object": {"const": "list"}, "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}}
    ),
    "Health": _object({"status": {"const": "ok"}}),
    "Document": {"type": "object", "required": ["openapi", "paths"]},
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                    "param": _NULLABLE_TEXT,
                    "code": _NULLABLE_TEXT,
                }
            )
        }
    ),
}
