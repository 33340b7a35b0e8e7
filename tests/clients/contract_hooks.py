"""Keeps what schemathesis makes up near the server's real models, and cheap."""

import schemathesis

MODELS = {
    "ChatBody": "smollm2-135m-instruct",
    "CompletionBody": "smollm2-135m-instruct",
    "EmbeddingsBody": "all-minilm-l6-v2",
}
ENCODER = "all-minilm-l6-v2"

# Tokens of an answer; more than this only takes time.
TOKENS = 2
WHOLE = 2**32 - 1


@schemathesis.hook
def before_load_schema(context, raw_schema):
    """The document leaves names of models open: another one is a 404 and tests little."""
    schemas = raw_schema["components"]["schemas"]
    for name, schema in schemas.items():
        properties = schema.get("properties", {})
        if name.endswith("Body") and "model" in properties:
            properties["model"] = {"enum": [MODELS.get(name, ENCODER)]}
    for path in raw_schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "model":
                    parameter["schema"] = {"enum": [ENCODER]}
                if parameter["name"] == "deadline":
                    # The drain is to last as long as this test.
                    parameter["schema"]["minimum"] = 80_000


def is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


@schemathesis.hook
def map_body(context, body):
    """Valid numbers of tokens become small ones."""
    if not isinstance(body, dict) or not ("messages" in body or "prompt" in body):
        return body
    asked = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if not asked:
        return {**body, "max_tokens": TOKENS}
    small = {
        name: min(body[name], TOKENS)
        for name in asked
        if is_whole(body[name]) and 0 < body[name] <= WHOLE
    }
    return {**body, **small}
