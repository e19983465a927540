"""A stand-in for the W&B server that listens on the loopback interface and stores everything in memory.

The client in the tests is the real wandb 0.31. The server answers the GraphQL operations that wandb.init (online),
`wandb sync` and wandb.Api send, and accepts the file stream. It stores rows unchanged by their line number, and does
not imitate other behaviour of W&B. It fails on demand (``server.fail``) and counts every request (``server.asked``).
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4
ENTITY = "tester"
HEAVY = ("config", "summaryMetrics", "systemMetrics", "historyKeys")  # fields that a lazy list of runs omits


@dataclass
class StoredRun:
    """One run as the server stores it."""

    name: str
    entity: str
    project: str
    number: int
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # line number -> row
    group: str | None = None
    display_name: str | None = None
    tags: list[str] = field(default_factory=list)
    state: str = "running"
    heartbeat: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the history in the order of their lines."""
        return [self.history[line] for line in sorted(self.history)]


@dataclass
class Fault:
    """The failure of the next ``times`` requests of ``operation``."""

    operation: str
    times: int
    status: int | None = None
    drop: bool = False
    slow_sec: float = 0.0
    refuse: str | None = None  # message of a GraphQL error


class WandbServer(ThreadingHTTPServer):
    """The stand-in server; ``with WandbServer() as server`` serves until the block ends."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, entities: tuple[str, ...] = (ENTITY,), page_limit: int = 10_000) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.entities = entities
        self.lock = threading.RLock()
        self.reset(page_limit=page_limit)

    def reset(self, *, page_limit: int = 10_000) -> None:
        """Forget all runs, faults and requests."""
        with self.lock:
            self.page_limit = page_limit  # maximum number of history rows per answer
            self.runs: dict[tuple[str, str, str], StoredRun] = {}
            self.projects: set[tuple[str, str]] = set()  # projects without runs
            self.asked: Counter[str] = Counter()
            self.unknown: list[str] = []
            self.faults: list[Fault] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that direct a client to this server, with retry waits of one second."""
        waits = {f"WANDB_X_{kind}_RETRY_WAIT_{end}_SECONDS": wait for kind in ("GRAPHQL", "FILE_STREAM")
                 for end, wait in (("MIN", "1"), ("MAX", "1"))}  # fmt: skip
        login = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ENTITY": ENTITY}
        return {**login, "WANDB_SILENT": "true", **waits}

    def fail(self, operation: str, *, times: int = 1, **how: Any) -> None:
        """Let the next ``times`` requests of ``operation`` fail. ``how`` holds the other fields of ``Fault``.

        ``operation`` is a GraphQL operation, file_stream, or any.
        """
        with self.lock:
            self.faults.append(Fault(operation=operation, times=times, **how))

    def fault_of(self, operation: str) -> Fault | None:
        """Return the fault that applies to a request of ``operation``, and count it as used; None if there is none."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.operation in (operation, "any"):
                    fault.times -= 1
                    return fault
        return None

    def run(self, name: str, project: str = "dlm", entity: str = ENTITY) -> StoredRun:
        return self.runs[entity, project, name]

    def add(self, name: str, *, project: str = "dlm", entity: str = ENTITY, **facts: Any) -> StoredRun:
        """Store a run without a client; ``rows`` is its history, and ``facts`` are other fields of ``StoredRun``."""
        rows = facts.pop("rows", [])
        run = StoredRun(name=name, entity=entity, project=project, number=len(self.runs), **facts)
        run.history = {line: {"_step": line, **row} for line, row in enumerate(rows)}
        run.config = {key: {"value": value} for key, value in run.config.items()}
        run.heartbeat = run.heartbeat or _now()
        self.runs[entity, project, name] = run
        return run

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of connections that a client has closed."""

    # --- GraphQL ----------------------------------------------------------------------------------------------------

    def answer(self, operation: str, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the ``data`` of one operation. Raises LookupError with the error message of the server."""
        simple = {
            "Viewer": self._viewer,
            "GetDefaultEntity": self._viewer,
            "ServerInfo": lambda: {"serverInfo": {"features": [], "latestLocalVersionInfo": None}},
            "ServerFeaturesQuery": lambda: {"serverInfo": {"features": []}},
            "OrganizationCoreWeaveOrganizationID": lambda: {"entity": {"organization": None}},
        }
        if operation in simple:
            return simple[operation]()
        one_run = {
            "Run": _node,
            "RunHistoryKeys": _node,
            "RunState": _node,
            "QueryRunInfo": _node,
            "RunParquetHistory": lambda run: {"parquetHistory": {"parquetUrls": [], "liveData": run.rows}},
            "HistoryPage": lambda run: {"history": self._page(run, asked)},
            "RunFullHistory": lambda run: {"history": self._page(run, asked)},
            "SampledHistoryPage": lambda run: {"sampledHistory": [self._with_keys(run, json.loads(asked["spec"]))]},
        }
        if operation in one_run:
            name = next(asked[key] for key in ("runName", "run", "name") if key in asked)
            run = self.runs.get((asked["entity"], asked["project"], name))
            return {"project": {"run": None if run is None else one_run[operation](run)}}
        if operation == "Runs":
            return self._runs(asked, without=HEAVY if "fragment LightweightRunFragment" in query else ())
        if operation == "RunResumeStatus":
            return self._resume(asked)
        if operation == "UpsertBucket":
            return self._upsert(asked)
        if operation == "CreateProject":
            place = self._check_entity(asked["input"]["entityName"]), asked["input"]["name"]
            self.projects.add(place)
            return {"result": {"project": None, "model": None, "inserted": True}}
        if operation == "CreateRunFiles":
            url = f"{self.url}/upload/{asked['run']}"
            files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in asked["files"]]
            return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}
        self.unknown.append(operation)
        raise LookupError(f"the stand-in server does not know {operation}: {query}")

    def _viewer(self) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": name}} for name in self.entities]}
        viewer = {"id": "VXNlcjox", "entity": ENTITY, "username": ENTITY, "email": "t@example.org", "flags": "{}",
                  "admin": False, "name": ENTITY, "teams": teams}  # fmt: skip
        return {"viewer": viewer}

    def _page(self, run: StoredRun, asked: dict[str, Any]) -> list[str]:
        rows = [row for row in run.rows if asked["minStep"] <= row["_step"] < asked["maxStep"]]
        return [json.dumps(row) for row in rows[: min(asked["pageSize"], self.page_limit)]]

    def _with_keys(self, run: StoredRun, spec: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the keys of ``spec`` in all rows that have every one of these keys."""
        rows = [row for row in run.rows if spec["minStep"] <= row["_step"] <= spec["maxStep"]]  # maxStep is inclusive
        return [{key: row[key] for key in spec["keys"]} for row in rows if all(key in row for key in spec["keys"])]

    def _runs(self, asked: dict[str, Any], *, without: tuple[str, ...]) -> dict[str, Any]:
        found = [run for run in self.runs.values() if (run.entity, run.project) == (asked["entity"], asked["project"])]
        if not found and (asked["entity"], asked["project"]) not in self.projects:
            return {"project": None}
        found = [run for run in found if _matches(run, json.loads(asked.get("filters") or "{}"))]
        begin = int(asked.get("cursor") or 0)
        page = found[begin : begin + asked["perPage"]]
        nodes = [{key: value for key, value in _node(run).items() if key not in without} for run in page]
        edges = [{"node": node, "cursor": str(begin + place + 1)} for place, node in enumerate(nodes)]
        more = begin + len(page) < len(found)
        info = {"endCursor": edges[-1]["cursor"] if edges else None, "hasNextPage": more}
        return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False,
                            "runs": {"edges": edges, "pageInfo": info}}}  # fmt: skip

    def _check_entity(self, entity: str | None) -> str:
        if entity not in (None, "", *self.entities):
            raise LookupError(f"entity {entity} not found during upsertBucket")
        return entity or ENTITY

    def _resume(self, asked: dict[str, Any]) -> dict[str, Any]:
        entity = asked.get("entity") or ENTITY
        run = self.runs.get((entity, asked["project"], asked["name"]))
        if run is None:
            return {"model": None}
        bucket = {
            "id": run.name, "name": run.name, "summaryMetrics": json.dumps(run.summary),
            "displayName": run.display_name, "logLineCount": 0, "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]), "eventsTail": "[]",
            "config": json.dumps(run.config), "tags": run.tags, "notes": None, "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"model": {"id": asked["project"], "name": asked["project"], "entity": {"id": entity, "name": entity},
                          "bucket": bucket}}  # fmt: skip

    def _upsert(self, asked: dict[str, Any]) -> dict[str, Any]:
        entity = self._check_entity(asked.get("entity"))
        place = (entity, asked.get("project") or "uncategorized", asked["name"])
        inserted = place not in self.runs
        run = self.runs.setdefault(
            place, StoredRun(name=place[2], entity=entity, project=place[1], number=len(self.runs))
        )
        if asked.get("config"):
            run.config = json.loads(asked["config"])
        run.group = asked.get("groupName") or run.group
        run.display_name = asked.get("displayName") or run.display_name
        run.tags = asked.get("tags") or run.tags
        run.state, run.heartbeat = "running", _now()
        bucket = {"id": run.name, "name": run.name, "displayName": run.display_name, "description": None,
                  "config": json.dumps(run.config), "sweepName": None, "historyLineCount": len(run.history),
                  "project": {"id": run.project, "name": run.project,
                              "entity": {"id": entity, "name": entity}}}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    # --- file stream ------------------------------------------------------------------------------------------------

    def stream(self, entity: str, project: str, name: str, body: dict[str, Any]) -> None:
        """Process one message of the file stream."""
        run = self.runs[entity, project, name]
        for path, part in (body.get("files") or {}).items():
            lines = part.get("content") or []
            if path == "wandb-history.jsonl":
                run.history |= {part["offset"] + place: json.loads(line) for place, line in enumerate(lines)}
            elif path == "wandb-summary.json" and lines:
                run.summary = json.loads(lines[-1])
        run.heartbeat = _now()
        if body.get("complete"):
            run.state = "failed" if body.get("exitcode") else "finished"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _node(run: StoredRun) -> dict[str, Any]:
    """Return a run with the fields that the GraphQL fragments of wandb.Api request."""
    rows = run.rows
    keys = {key: {"typeCounts": [{"type": "number", "count": len(rows)}]} for row in rows for key in row}
    history_keys = {"sets": [], "keys": keys, "lastStep": max((row["_step"] for row in rows), default=-1)}
    return {
        "id": f"run:{run.number}", "projectId": "1", "tags": run.tags, "name": run.name,
        "displayName": run.display_name or run.name, "sweepName": None, "state": run.state, "group": run.group,
        "jobType": None, "commit": None, "readOnly": False, "createdAt": "2026-01-01T00:00:00Z",
        "heartbeatAt": run.heartbeat, "description": None, "notes": None, "historyLineCount": len(rows),
        "user": {"name": ENTITY, "username": ENTITY}, "config": json.dumps(run.config), "systemMetrics": "{}",
        "summaryMetrics": json.dumps(run.summary), "historyKeys": history_keys,
    }  # fmt: skip


def _matches(run: StoredRun, filters: dict[str, Any]) -> bool:
    """Return whether a run matches ``filters``, in the part of W&B's filter language that dlm uses.

    This part is equality, $in and $and.
    """
    facts = {"group": run.group, "state": run.state, "display_name": run.display_name, "name": run.name}
    facts |= {f"config.{key}.value": item.get("value") for key, item in run.config.items() if isinstance(item, dict)}
    for key, wanted in filters.items():
        if key == "$and":
            if not all(_matches(run, part) for part in wanted):
                return False
        elif key == "tags":
            if wanted not in run.tags:
                return False
        elif facts.get(key) not in (wanted["$in"] if isinstance(wanted, dict) else [wanted]):
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    """Handles the requests of one connection."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing; the tests read ``server.asked``."""

    def do_GET(self) -> None:
        self._send(404, {})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send(200, {})

    def do_POST(self) -> None:
        data = self._body()
        if self.path.startswith("/sdk/otel"):  # telemetry of the client
            return self._send(200, {})
        body = json.loads(data or b"{}")
        stream = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", self.path)
        query = body.get("query", "")
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        operation = "file_stream" if stream else named[1] if named else self.path
        with self.server.lock:
            self.server.asked[operation] += 1
        fault = self.server.fault_of(operation)
        if fault is not None:
            time.sleep(fault.slow_sec)
            if fault.drop:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return None
            if fault.status is not None:
                return self._send(fault.status, {"error": f"status {fault.status} on demand"})
            if fault.refuse is not None:
                return self._send(200, {"data": None, "errors": [{"message": fault.refuse, "path": []}]})
        login = base64.b64encode(f"api:{KEY}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {login}":
            return self._send(401, {"error": "user is not logged in"})
        with self.server.lock:
            if stream:
                self.server.stream(*stream.groups(), body)
                return self._send(200, {"exitcode": None, "limits": {}})
            try:
                answer = {"data": self.server.answer(operation, query, body.get("variables") or {})}
            except LookupError as error:
                answer = {"data": None, "errors": [{"message": str(error), "path": []}]}
        return self._send(200, answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            data = b"".join(parts)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(**how: Any) -> Iterator[WandbServer]:
    """Serve on a free port until the block ends."""
    with WandbServer(**how) as server:
        yield server
