"""constraints.txt pins every package that dlm[dev] requires, and requirements.lock holds hashes of the same versions.
`make audit` never says that nothing is known when it could not ask.
"""

import json
import platform
import re
import runpy
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, distribution
from threading import Thread

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import ROOT

CONSTRAINTS = (ROOT / "constraints.txt").read_text()
LOCK = (ROOT / "requirements.lock").read_text()
PINS = {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.M)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CUDA_ONLY = runpy.run_path(str(ROOT / "tools" / "lock.py"))["CUDA_ONLY"]
THE_TARGET = (sys.version_info[:2], sys.platform, platform.machine()) == ((3, 11), "linux", "x86_64")


def required_by_dlm(extra: str) -> list[Requirement]:
    return [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]]


def installed(name: str) -> str | None:
    """The version without its build, such as 2.13.0 for 2.13.0+cpu."""
    try:
        return distribution(name).version.partition("+")[0]
    except PackageNotFoundError:
        return None


def closure() -> set[str]:
    """Whatever dlm[dev] requires, directly or through other packages.

    The requirements of a package are known only where it is installed, and count only in the version that is pinned.
    """
    found: set[str] = set()
    left = [("dlm", "dev")]
    seen = set(left)
    while left:
        name, extra = left.pop()
        if name == "dlm":
            requirements = required_by_dlm(extra)
        elif installed(name) == PINS.get(name):
            requirements = [Requirement(text) for text in distribution(name).requires or []]
        else:
            requirements = []
        for requirement in requirements:
            other = canonicalize_name(requirement.name)
            if (requirement.marker and not requirement.marker.evaluate({"extra": extra})) or CUDA_ONLY.match(other):
                continue
            found.add(other)
            new = {(other, wanted) for wanted in requirement.extras or {""}} - seen
            seen |= new
            left += new
    return found - {"dlm"}


@pytest.mark.skipif(not THE_TARGET, reason="constraints.txt is made for CPython 3.11 on Linux on x86-64")
def test_every_package_that_dlm_requires_is_pinned_and_no_other():
    required = closure()
    assert not required - PINS.keys(), "run `make lock`"
    other_versions = {name for name in required if installed(name) != PINS[name]}
    if not other_versions:  # otherwise some requirements are unknown
        assert not PINS.keys() - required, "run `make lock`"


def test_the_pins_are_in_the_ranges_of_pyproject():
    for extra in ("hub", "notebook", "dev"):
        for requirement in required_by_dlm(extra):
            name = canonicalize_name(requirement.name)
            assert name == "dlm" or requirement.specifier.contains(PINS[name]), f"{requirement}: run `make lock`"


def test_the_lowest_version_of_every_package_was_tried():
    """`make test-oldest` writes the list once everything has worked with these versions."""
    tried = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tools" / "oldest.txt").read_text(), re.M)
    versions = {canonicalize_name(name): Version(version) for name, version in tried}
    for requirement in [one for extra in ("hub", "notebook") for one in required_by_dlm(extra)]:
        lowest = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        if requirement.name != "torch":
            assert lowest == [versions[canonicalize_name(requirement.name)]], f"{requirement}: run `make test-oldest`"


def test_torch_is_pinned_without_its_build_and_without_cuda():
    assert not any("+" in version for version in PINS.values())
    assert not [name for name in PINS if CUDA_ONLY.match(name)] and "flash-attn" not in PINS


def test_the_lock_file_has_hashes_of_the_pinned_versions_of_all_packages_but_torch():
    packages = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", LOCK, re.M)
    assert {name: version for name, version, _ in packages} == {n: v for n, v in PINS.items() if n != "torch"}


@pytest.mark.parametrize("text", [CONSTRAINTS, LOCK], ids=["constraints.txt", "requirements.lock"])
def test_the_files_name_their_command_and_are_sorted_and_name_no_server(text):
    assert text.startswith("# Written by `make lock`") and "://" not in text and "--index-url" not in text
    names = re.findall(r"^([\w.-]+)==", text, re.M)
    assert names == sorted(set(names))


class Audit:
    """`make audit` with a list of known vulnerabilities on this machine."""

    def __init__(self):
        self.pages: list[dict | bytes] = []  # the answers, in order
        self.asked: list[list[dict]] = []
        audit = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                audit.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"])
                page = audit.pages.pop(0)
                if isinstance(page, dict):
                    named = [page.get(query["package"]["name"], {}) for query in audit.asked[-1]]
                    page = json.dumps({"results": named}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/querybatch"
        Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def run(self, *pages: dict | bytes) -> subprocess.CompletedProcess:
        self.pages = list(pages)
        command = [sys.executable, ROOT / "tools" / "audit.py", "--url", self.url]
        return subprocess.run(command, capture_output=True, text=True)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def audit(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    one = Audit()
    yield one
    one.stop()


def test_the_audit_asks_about_every_pin(audit):
    ended = audit.run({})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"0 of the {len(PINS)} packages in constraints.txt have known vulnerabilities\n"
    [asked] = audit.asked
    assert all(query["package"]["ecosystem"] == "PyPI" for query in asked)
    assert {query["package"]["name"]: query["version"] for query in asked} == PINS


def test_the_audit_prints_what_is_known_and_turns_the_pages(audit):
    first = {"idna": {"vulns": [{"id": "GHSA-1"}, {"id": "PYSEC-2"}]}, "torch": {"next_page_token": "more"}}
    ended = audit.run(first, {"torch": {"vulns": [{"id": "CVE-3"}]}})
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.splitlines() == [
        f"idna {PINS['idna']}: GHSA-1, PYSEC-2",
        f"torch {PINS['torch']}: CVE-3",
        f"2 of the {len(PINS)} packages in constraints.txt have known vulnerabilities",
    ]
    assert [(query["package"]["name"], query["page_token"]) for query in audit.asked[1]] == [("torch", "more")]


@pytest.mark.parametrize(
    "page",
    [b"<html>Log in</html>", b"[]", b'{"results": []}', {"idna": {"vulns": [{"id": "\x1b[2J"}]}}, {"idna": [1]}],
    ids=["a page", "a list", "too few", "an id with an escape sequence", "no result"],
)
def test_another_answer_is_no_answer(audit, page):
    ended = audit.run(page)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert (
        ended.stderr == f"what answered is not the list of known vulnerabilities ({audit.url}): nothing was checked\n"
    )


def test_a_list_that_cannot_be_reached_is_no_answer(audit):
    audit.stop()
    ended = audit.run()
    assert (ended.returncode, ended.stdout) == (3, "")
    assert re.fullmatch(
        r"could not reach the list of known vulnerabilities \(.*refused.*\): nothing was checked\n", ended.stderr
    )
