"""Parses PromQL. Reads [{"name", "query"}] as JSON, prints for each one its selectors and what it
groups by, or the parser's error: [{"name", "error"} | {"name", "selectors", "labels"}].
"""

import json
import sys

import promql_parser as promql


def children(expr):
    for field in ("lhs", "rhs", "expr", "param", "vector_selector"):
        child = getattr(expr, field, None)
        if child is not None and not isinstance(child, (str, int, float)):
            yield child
    yield from getattr(expr, "args", None) or []


def walk(expr, found):
    if isinstance(expr, promql.VectorSelector):
        matchers = [[m.name, str(m.op), m.value] for m in expr.matchers.matchers]
        found["selectors"].append({"metric": expr.name, "matchers": matchers})
        return
    for field in ("modifier",):
        modifier = getattr(expr, field, None)
        for inner in (modifier, getattr(modifier, "matching", None)):
            found["labels"] += list(getattr(inner, "labels", None) or [])
    for child in children(expr):
        walk(child, found)


def main():
    answers = []
    for item in json.load(sys.stdin):
        found = {"name": item["name"], "selectors": [], "labels": []}
        try:
            walk(promql.parse(item["query"]), found)
        except ValueError as error:
            found = {"name": item["name"], "error": str(error)}
        answers.append(found)
    json.dump(answers, sys.stdout)


main()
