"""Keeps what schemathesis makes up near the server's real models, and cheap."""

import schemathesis

GENERATOR = "smollm2-135m-instruct"
ENCODER = "all-minilm-l6-v2"

# Tokens of an answer; more than this only takes time.
TOKENS = 2
WHOLE = 2**32 - 1

# Seconds; the longest deadline that a drain takes.
DAY = 86_400


@schemathesis.hook
def before_load_schema(context, raw_schema):
    """The document leaves the names of models open: another one is a 404 and tests little."""
    for path in raw_schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "model":
                    parameter["schema"] = {"enum": [ENCODER]}


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= WHOLE


def spare_the_drain(query):
    """The drain is to last as long as this test."""
    deadline = query.get("deadline", DAY) if query is not None else None
    try:
        sound = 0 <= float(deadline) <= DAY
    except (TypeError, ValueError):
        sound = False
    if sound:
        query["deadline"] = DAY


@schemathesis.hook
def before_call(context, case, kwargs):
    """Names become those of real models; valid numbers of tokens small ones, and so does none."""
    if case.operation.path == "/drain" and case.method.upper() == "POST":
        spare_the_drain(case.query)
    body = case.body
    if not isinstance(body, dict):
        return
    generates = case.operation.path in ("/v1/chat/completions", "/v1/completions")
    if isinstance(body.get("model"), str):
        body["model"] = GENERATOR if generates else ENCODER
    if not generates:
        return
    for name in ("max_tokens", "max_completion_tokens"):
        if is_count(body.get(name)):
            body[name] = min(body[name], TOKENS)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = TOKENS
