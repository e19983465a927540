"""Which files jobs get a copy of, and which files stay where they are: secrets, notes, what git ignores."""

import os
import subprocess
from pathlib import Path

import pytest
from support.submissions import make_job

from dlm.core import code_files as rule
from dlm.core.errors import UserError
from dlm.core.git import code_origin
from dlm.core.paths import PACKAGE, configs_dir
from dlm.submit import submission
from dlm.submit.slurm import Slurm, SlurmSettings
from dlm.submit.snapshot import snapshot_code
from dlm.submit.submission import submit_jobs

KEY = "0123456789abcdef" * 2 + "01234567"


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small checkout in a repository that holds more than dlm."""
    root = tmp_path / "repository/ours"
    for name in ("dlm/__init__.py", "dlm/data/tokenizer.py", "dlm/page.css", "configs/config.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# first\n")
    (root / ".gitignore").write_text("local.yaml\n*.log\nmine.py\n")
    monkeypatch.setenv("DLM_CONFIGS", str(root / "configs"))
    git(root.parent, "init")
    git(root.parent, "add", "-A")
    git(root.parent, "commit", "-m", "all")
    return root


def copied(root: Path, tmp_path: Path) -> Path:
    return snapshot_code(
        tmp_path / "work/demo", package=root / "dlm", configs=root / "configs", origin=code_origin(root / "dlm")
    )


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


CODE = {"dlm/__init__.py", "dlm/data/tokenizer.py", "dlm/page.css", "configs/config.yaml"}


def test_copy_and_diff_hold_code_and_nothing_else(root, tmp_path, monkeypatch, capfd):
    for name in ("configs/.env", "configs/notes.txt", "dlm/.netrc", "configs/local.yaml", "dlm/run.log",
                 "configs/.secret/x.yaml"):  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"WANDB_API_KEY={KEY}\n")
    (root / "configs/mine.yaml").write_text("x: 1\n")
    (root / "dlm/page.css").write_bytes("größer".encode("latin-1"))
    os.umask(before := os.umask(0))
    code = copied(root, tmp_path)
    diff = code.with_name(f"{code.name}.diff")
    assert names_in(code) == CODE | {"configs/mine.yaml"}
    assert not any(KEY.encode() in path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file())
    assert diff.stat().st_mode & 0o777 == 0o600 & ~before
    assert (code / "dlm/page.css").stat().st_mode & 0o777 == 0o666 & ~before

    monkeypatch.setattr(submission, "code_origin", lambda: code_origin(root / "dlm"))
    cluster = Slurm(SlurmSettings(allow_dirty=True))
    monkeypatch.setattr(Slurm, "check", lambda *_: None)
    monkeypatch.setattr(Slurm, "submit", lambda *_: None)
    submit_jobs([make_job(tmp_path, "a")], cluster=cluster, sweep_dir=tmp_path / "work/demo")
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "dlm: jobs also get the files that git does not track: ours/configs/mine.yaml",
        "dlm: jobs do not get these files, which are no code or which git ignores: ours/dlm/.netrc, ours/configs/.env, "
        "ours/configs/local.yaml, ours/configs/notes.txt, ours/configs/.secret/x.yaml",
    ]

    for name in ("configs/mine.yaml", "dlm/page.css"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (root / name).rename(tmp_path / name)
    git(root, "checkout", ".")
    git(root.parent, "apply", str(diff))  # the commit and the diff give what ran
    assert all((root / name).read_bytes() == (tmp_path / name).read_bytes() for name in
               ("configs/mine.yaml", "dlm/page.css"))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("configs/secrets.yaml", "x: 1"),
        ("dlm/wandb_key.py", "KEY = 1"),
        ("configs/mine.yaml", f"a: 1\nenv:\n  WANDB_API_KEY: {KEY}"),
        ("configs/mine.yaml", f"a: 1\nenv:\n  WANDB_API_KEY: local-{KEY}"),
        ("configs/mine.yaml", f"machine api.wandb.ai login user password {KEY}"),
        ("configs/mine.yaml", f"remote: https://{KEY}@git.example.org/a/b"),
        ("configs/mine.yaml", "a: glpat-" + "aB3-" * 5),
        ("configs/config.yaml", "logger: https://me:hunter22@wandb.example.org"),  # this file is in the commit
        ("configs/mine.yaml", "a: hf_" + "aB3" * 11),
        ("configs/mine.yaml", "a: AKIA" + "ABCD" * 4),
        ("dlm/mine_too.py", '"""\n-----BEGIN OPENSSH PRIVATE KEY-----\n"""'),
        ("dlm/mine_too.py", 'password = "s3cretpasswordxyz1234567"'),
    ],
)
def test_what_looks_like_a_secret_is_refused(root, tmp_path, name, content):
    (root / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name} looks like a secret \((its name|line \d)\)") as refused:
        copied(root, tmp_path)
    assert not any(secret in str(refused.value) for secret in (KEY, "hunter22", "hf_a", "AKIA", "s3cret"))
    assert not (tmp_path / "work").exists()


def test_ordinary_code_is_no_secret(root, tmp_path):
    (root / "configs/tokens.yaml").write_text(
        "text_key: document_text_of_2024_version_3\npad_token: reserved_special_token_250\npath: /data/key=x\n"
    )
    (root / "dlm/keys.py").write_text('api_key = os.environ["WANDB_API_KEY"]\ntoken = first_token_of(batch32)\n')
    assert {"configs/tokens.yaml", "dlm/keys.py"} <= names_in(copied(root, tmp_path))
    shipped = [*rule.code_files(PACKAGE).tracked, *rule.code_files(configs_dir()).tracked]
    rule.check_uncommitted(shipped)  # otherwise an edit of a file of dlm could not be tried


def test_too_much_that_no_commit_holds_is_refused(root, tmp_path):
    with open(root / "configs/large.yaml", "wb") as stream:
        stream.truncate(20_000_000)
    with pytest.raises(UserError, match=r"large.yaml alone 20.0 MB: at most 10 MB are copied for jobs"):
        copied(root, tmp_path)


def test_a_module_that_git_ignores_is_refused_because_jobs_would_lack_it(root, tmp_path):
    (root / "dlm/data/mine.py").touch()
    with pytest.raises(UserError, match=r"git ignores \S+/dlm/data/mine.py, so the copy of the code .* would lack it"):
        copied(root, tmp_path)


def test_without_git_all_is_copied_but_dot_files_and_secrets_are_not(root, tmp_path):
    (root.parent / ".git").rename(tmp_path / "away")
    (root / "configs/.env").write_text(KEY)
    code = copied(root, tmp_path)
    assert names_in(code) == CODE
    assert snapshot_code(tmp_path / "work/demo", package=code / "dlm", configs=code / "configs") == code
    (root / "configs/notes.txt").write_text(f"key: {KEY}")
    with pytest.raises(UserError, match=r"notes.txt looks like a secret"):
        copied(root, tmp_path)
