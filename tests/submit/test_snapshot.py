"""The copy of the code that jobs run, and changes that no commit holds."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dlm.core.errors import UserError
from dlm.core.git import code_origin
from dlm.core.paths import PACKAGE, configs_dir
from dlm.submit import snapshot, submission
from dlm.submit.job import Job
from dlm.submit.slurm import Slurm
from dlm.submit.snapshot import snapshot_code
from dlm.submit.submission import submit_jobs


def test_the_snapshot_is_made_once_per_content_and_an_edit_of_it_is_seen(tmp_path):
    package = tmp_path / "src/dlm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    first = snapshot_code(tmp_path, package=package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__/x.pyc").write_bytes(b"1")
    assert snapshot_code(tmp_path, package=package) == first
    (package / "flops.py").write_text("# changed\n")
    second = snapshot_code(tmp_path, package=package)
    assert second != first and (first / "dlm/core/flops.py").read_text() != "# changed\n"
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == sorted([first.name, second.name])
    (second / "dlm/core/flops.py").write_text("# edited in place\n")
    with pytest.raises(UserError, match="was changed after it was written"):
        snapshot_code(tmp_path, package=package)


def test_what_a_copy_holds_besides_the_code_is_not_run(tmp_path):
    package = tmp_path / "src/dlm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    copy = snapshot_code(tmp_path, package=package)
    bytecode = copy / "dlm/__pycache__/launch.cpython-312.pyc"
    bytecode.parent.mkdir()
    bytecode.write_bytes(b"Python would prefer this to launch.py")
    assert snapshot_code(tmp_path, package=package) == copy and not bytecode.exists()
    (tmp_path / "evil").mkdir()
    for add in (
        lambda: (copy / "sitecustomize.pyc").write_bytes(b"Python would import this without a source"),
        lambda: (copy / "torch").symlink_to(tmp_path / "evil"),
        lambda: (copy / "torch.py").symlink_to(tmp_path / "nothing"),
        lambda: (copy / "torch.py").touch(),
    ):
        add()
        with pytest.raises(UserError, match="was changed after it was written"):
            snapshot_code(tmp_path, package=package)
        shutil.rmtree(copy)
        snapshot_code(tmp_path, package=package)


def test_the_whole_hash_of_a_copy_counts(tmp_path, monkeypatch):
    package = tmp_path / "src/dlm"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    real = snapshot.content_hash_of
    copy = snapshot_code(tmp_path, package=package)
    (copy / "dlm/core/flops.py").write_text("# another content, whose hash was made to begin with the same digits\n")
    monkeypatch.setattr(
        snapshot, "content_hash_of", lambda folder: copy.name + real(folder)[8:] if folder == copy else real(folder)
    )
    with pytest.raises(UserError, match="was changed after it was written"):
        snapshot_code(tmp_path, package=package)


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_repository_of_somebody_else_is_named(tmp_path, capsys):
    root = tmp_path / "repository"
    (root / "dlm").mkdir(parents=True)
    (root / "dlm/__init__.py").touch()
    git(root, "init")
    git(root, "add", "-A")
    git(root, "commit", "-m", "all")
    for path in (root, *root.rglob("*")):
        os.chown(path, 12345, 12345)
    assert [code_origin(root / "dlm") for _ in range(2)] == [None, None]
    said = capsys.readouterr().err
    assert said.count("belongs to somebody else") == 1 and f"safe.directory {root}" in said


def test_changes_that_no_commit_holds_need_a_word_and_their_diff_is_kept(tmp_path, monkeypatch):
    root = tmp_path / "repository"
    shutil.copytree(PACKAGE, root / "dlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(configs_dir(), root / "configs")
    monkeypatch.setenv("DLM_CONFIGS", str(root / "configs"))
    (root / "pyproject.toml").touch()
    assert code_origin(root / "dlm") is None  # no repository
    git(root, "init")
    git(root, "add", "-A")
    git(root, "commit", "-m", "all")
    clean = code_origin(root / "dlm")
    assert clean is not None and (clean.changed, clean.diff) == ((), b"")
    (root / "notes.txt").write_text("is no code")
    assert code_origin(root / "dlm") == clean
    (root / "dlm/core/flops.py").write_text("# changed\n")
    (root / "configs/data/mine.yaml").write_text("name: mine\n")
    (root / "configs/data/mein größter.yaml").write_text("name: ours\n")
    (root / "pyproject.toml").write_text("[x]\n")
    origin = code_origin(root / "dlm")
    assert origin is not None and origin.sha == clean.sha
    assert set(origin.changed) == {
        "dlm/core/flops.py",
        "configs/data/mine.yaml",
        "configs/data/mein größter.yaml",
        "pyproject.toml",
    }
    assert all(line in origin.diff for line in (b"+# changed", b"+name: mine", b"+name: ours", b"+[x]"))
    monkeypatch.setattr(submission, "code_origin", lambda: origin)
    job = Job(name="a", overrides=("+cell=a",), run_dir=tmp_path / "work/demo/runs/a")
    with pytest.raises(UserError, match=r"not committed: .*; commit first, or submit with --allow-dirty"):
        submit_jobs([job], cluster=Slurm(), sweep_dir=tmp_path / "work/demo")
    assert not (tmp_path / "work").exists()
    code = snapshot_code(tmp_path / "work/demo", package=root / "dlm", configs=root / "configs", origin=origin)
    git(root, "stash", "--include-untracked")
    git(root, "apply", str(code.with_name(f"{code.name}.diff")))  # the commit and the diff give what ran
    assert (root / "dlm/core/flops.py").read_bytes() == (code / "dlm/core/flops.py").read_bytes() == b"# changed\n"
    assert (root / "configs/data/mine.yaml").read_bytes() == (code / "configs/data/mine.yaml").read_bytes()
