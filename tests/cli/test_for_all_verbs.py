"""The options that stand before a verb, and what `dlm` says about words that it does not know."""

import os
import subprocess
import sys

import pytest

import dlm


def run(*words, folder, **environment):
    """Run `dlm`. Returns its exit code, and what it printed to stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", "from dlm.cli.entry import main; main()", *words],
        cwd=folder,
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_version_is_printed(tmp_path):
    assert run("--version", folder=tmp_path) == (0, f"dlm {dlm.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plann"], "dlm: no such command 'plann'. Did you mean 'plan'? (`dlm --help` lists what is allowed)\n"),
        (["--quick"], "dlm: no such option: --quick (`dlm --help` lists what is allowed)\n"),
        (["status", "--watc"], "dlm: no such option: --watc (Possible options: --watch) (`dlm status --help` lists "),
        (["plan"], "dlm: missing argument 'target' (`dlm plan --help` lists what is allowed)\n"),
        (["fit", "x.csv", "--seed", "two"], "dlm: invalid value for '--seed': "),
        (["plan", "demo", "--debug"], "dlm: --debug stands before the verb: dlm --debug plan ...\n"),
    ],
)
def test_a_word_that_is_not_allowed_is_one_line_and_exit_code_2(tmp_path, words, said):
    code, out, err = run(*words, folder=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(said)


def test_without_words_the_help_is_shown(tmp_path):
    code, out, _ = run(folder=tmp_path)
    assert code == 2 and "dlm VERB --help" in out


def test_debug_shows_the_traceback_of_a_mistake_and_keeps_it_in_a_log(tmp_path):
    code, _, err = run("--debug", "fit", "none.csv", folder=tmp_path)
    assert code == 2 and err.startswith("Traceback") and err.splitlines()[-1].startswith("dlm: no file none.csv")
    log = (tmp_path / "dlm-debug.log").read_text()
    assert f"fit none.csv: dlm {dlm.__version__}, Python" in log and "UserError: no file none.csv" in log
    assert str(tmp_path / "dlm-debug.log") in err


def test_without_debug_a_mistake_leaves_no_log(tmp_path):
    code, _, err = run("fit", "none.csv", folder=tmp_path)
    assert code == 2 and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_a_mistake(tmp_path):
    (tmp_path / "dlm-debug.log").mkdir()
    code, _, err = run("--debug", "fit", "none.csv", folder=tmp_path)
    assert code == 2 and err.startswith("dlm: --debug writes dlm-debug.log into the current folder: ")


def test_the_shell_completes_verbs(tmp_path):
    asked = {"_DLM_COMPLETE": "complete_bash", "COMP_WORDS": "dlm rep", "COMP_CWORD": "1"}
    words = "import sys; sys.argv[0] = 'dlm'; from dlm.cli.entry import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", words], env={**os.environ, **asked}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["report"], done.stderr
