"""Ask OSV, a public list of known vulnerabilities, about every package of constraints.txt, and print what it knows.

`make audit` runs this. It exits with 0 if the list knows nothing, 1 if it knows something, 3 if nothing was checked.
"""

import argparse
import json
import re
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
URL = "https://api.osv.dev/v1/querybatch"  # described at https://google.github.io/osv.dev/post-v1-querybatch/
MAX_PAGES = 100
_ID = re.compile(r"[\w.:-]+")


class NotCheckedError(Exception):
    """The list gave no usable answer."""


def ask(url: str, queries: list[dict[str, Any]]) -> list[tuple[list[str], str | None]]:
    """Return for each query the ids of known vulnerabilities, and a token if the list has more of them."""
    request = urllib.request.Request(
        url, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = response.read()
    except (OSError, HTTPException) as error:
        raise NotCheckedError(f"could not reach the list of known vulnerabilities ({url}: {error})") from error
    try:
        results = [_ids_and_token(result) for result in json.loads(answer)["results"]]
    except (ValueError, KeyError, TypeError, AttributeError):  # such as the page of a login
        results = []
    if len(results) != len(queries):
        raise NotCheckedError(f"what answered is not the list of known vulnerabilities ({url})")
    return results


def _ids_and_token(result: dict[str, Any]) -> tuple[list[str], str | None]:
    ids = [entry["id"] for entry in result.get("vulns", [])]
    if not all(_ID.fullmatch(one) for one in ids):
        raise ValueError(ids)
    return ids, result.get("next_page_token")


def known(url: str, pins: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the ids of the known vulnerabilities of each package that has some."""
    queries: list[dict[str, Any]] = [
        {"package": {"ecosystem": "PyPI", "name": name}, "version": version} for name, version in pins
    ]
    found: dict[str, list[str]] = {}
    for _ in range(MAX_PAGES):
        more = []
        for query, (ids, token) in zip(queries, ask(url, queries), strict=True):
            if ids:
                found.setdefault(f"{query['package']['name']} {query['version']}", []).extend(ids)
            if token:
                more.append(query | {"page_token": token})
        if not more:
            return found
        queries = more
    raise NotCheckedError(f"the list of known vulnerabilities has more than {MAX_PAGES} pages ({url})")


def main() -> int:
    """Print one line for each package with a known vulnerability, and a summary; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default=URL, help="where to ask")
    url = parser.parse_args().url
    pins = re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    try:
        if not pins:
            raise NotCheckedError(f"{CONSTRAINTS} pins no package")
        found = known(url, pins)
    except NotCheckedError as error:
        print(f"{error}: nothing was checked", file=sys.stderr)
        return 3
    for package, ids in found.items():
        print(f"{package}: {', '.join(ids)}")
    print(f"{len(found)} of the {len(pins)} packages in {CONSTRAINTS.name} have known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
