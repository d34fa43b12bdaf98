"""The walk into the tree of ``/metadata/instance``: the element at a path, as JSON or text. Pure.

Wire facts: instance-metadata-service.md of azure-compute-docs. A leaf needs ``format=text``; arrays are indexed by number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from caesura_metadata_publisher.instance_fields import Tree
from caesura_metadata_publisher.request import HttpResponse, bad_request, not_found


def answer_instance(
    tree: Mapping[str, Tree], path: Sequence[str], form: Literal["json", "text"]
) -> HttpResponse:
    """The element at ``path``, as JSON or text."""
    element: Tree = tree
    for segment in path:
        found = _child(element, segment)
        if found is None:
            return not_found()
        element = found
    if form == "json":
        if isinstance(element, str):
            return bad_request("This element is a leaf: ask for it with format=text.")
        return HttpResponse(status=200, body=msgspec.json.encode(element))
    text = element if isinstance(element, str) else "\n".join(_listing(element))
    return HttpResponse(status=200, body=text.encode(), content_type="text/plain; charset=utf-8")


def _child(element: Tree, segment: str) -> Tree | None:
    if isinstance(element, str):
        return None
    if isinstance(element, Mapping):
        # Names are found in any case: the documented examples write `Network.interface` and `Priority` for what is in lower case.
        wanted = segment.lower()
        return next((child for name, child in element.items() if name.lower() == wanted), None)
    if segment.isascii() and segment.isdigit() and int(segment) < len(element):
        return element[int(segment)]
    return None


def _listing(element: Mapping[str, Tree] | Sequence[Tree]) -> list[str]:
    # As the service lists a directory: names of elements with children end in a slash.
    pairs = element.items() if isinstance(element, Mapping) else ((str(i), e) for i, e in enumerate(element))
    return [name if isinstance(child, str) else f"{name}/" for name, child in pairs]
