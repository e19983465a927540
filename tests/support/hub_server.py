"""A stand-in for the Hugging Face hub on this machine: data sets with commits, and the requests for them."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class HubServer:
    """Serves data sets as the hub does, for clients whose HF_ENDPOINT is ``url``."""

    def __init__(self):
        self.branches = {}  # (repository, branch or sha) -> sha
        self.files = {}  # (repository, sha) -> {path: bytes}
        self.gated = set()
        self.is_down = False  # whether it closes every connection without an answer
        self.failure = None  # the HTTP status with which it answers every request; None: it works
        self.downloads = []  # paths of the files that were sent, in order
        self.hold_after = None  # after this many of them, the server keeps clients waiting until ``go_on``
        self.held, self._free = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def go_on(self):
        self.hold_after = None
        self._free.set()

    def wait_if_held(self):
        if self.hold_after is not None and len(self.downloads) >= self.hold_after:
            self.held.set()
            self._free.wait()

    def commit(self, repository, files):
        """Replace the files of a repository, and return the sha of the commit."""
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.files[repository, sha] = files
        self.branches[repository, "main"] = self.branches[repository, sha] = sha
        return sha


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.do_GET()

    def do_GET(self):
        if self.hub.is_down:
            self.close_connection = True
            return
        if self.hub.failure is not None:
            self._refuse(self.hub.failure, "Failure")
            return
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, repository, rest):
        if rest == ["auth-check"] and repository in self.hub.gated:
            self._refuse(403, "GatedRepo")
            return
        verb, revision, *path = rest if len(rest) > 1 else ("revision", "main")
        sha = self._sha(repository, revision)
        if sha is None:
            return
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(self.hub.files[repository, sha].items())
        ]
        folders = {"/".join(e["path"].split("/")[:n]) for e in entries for n in range(1, e["path"].count("/") + 1)}
        entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        if verb == "paths-info":
            body = json.loads(self.body) if self.body.startswith("{") else parse_qs(self.body)
            self._json([entry for entry in entries if entry["path"] in body["paths"]])
        elif verb == "tree":
            below = "/".join(path)
            deep = "true" in parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower()
            inside = [e for e in entries if not below or e["path"].startswith(f"{below}/")]
            cut = len(below) + 1 if below else 0
            self._json([e for e in inside if deep or "/" not in e["path"][cut:]])
        else:
            siblings = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
            gated = "auto" if repository in self.hub.gated else False
            self._json(
                {"id": repository, "sha": sha, "siblings": siblings, "gated": gated, "private": False, "tags": []}
            )

    def _file(self, repository, revision, path):
        sha = self._sha(repository, revision)
        if sha is None:
            return
        content = self.hub.files[repository, sha].get(path)
        if repository in self.hub.gated:
            self._refuse(403, "GatedRepo")
        elif content is None:
            self._refuse(404, "EntryNotFound")
        else:
            self.hub.wait_if_held()
            if self.command == "GET" and path != "README.md":
                self.hub.downloads.append(path)
            start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
            self._send(206 if start else 200, content[start:], headers)

    def _sha(self, repository, revision):
        known = any(name == repository for name, _ in self.hub.branches)
        sha = self.hub.branches.get((repository, revision))
        if sha is None:
            self._refuse(404 if known else 401, "RevisionNotFound" if known else "RepoNotFound")
        return sha

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code):
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
