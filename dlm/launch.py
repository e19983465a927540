"""Train one run, or several with -m: `python -m dlm.launch [overrides]`, the Hydra entry point of dlm.

Torch and Lightning are imported only when a run starts, so composing, naming and submitting runs stays fast.
"""

from __future__ import annotations

import os

from dlm.core import signals

if __name__ == "__main__":  # first of all: the imports below take seconds
    signals.exit_at_ctrl_c()
    if "DLM_SUBMISSION" in os.environ:
        signals.remember()  # a submitted run may be told to stop while they are going on

import contextlib
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dlm.core import classes, paths
from dlm.core.checks import check_keys, dotted_keys, takes
from dlm.core.configs import choices, load_choice
from dlm.core.errors import ExitCode, UserError, causes, hint, unknown
from dlm.core.files import explain_os_error
from dlm.core.identity import SWEEP_NAME, SWEEP_NAME_WORDS, cell_id
from dlm.core.lease import HeldError
from dlm.core.limits import check_override_extents
from dlm.core.names import printable
from dlm.core.recipe import derive, fill
from dlm.core.replaced_keys import MODELS, instead_of
from dlm.record.aside import RERUN, in_words, set_aside
from dlm.record.run import Result
from dlm.record.wandb import check_names

# The groups of configs/ of which every run has a choice.
GROUPS = ("model", "data", "objective", "optimizer", "scheduler", "trainer", "callbacks", "logger", "paths")

# The config nodes that determine the id of the run.
NODES = ("model", "data", "objective", "optimizer", "scheduler", "training", "validation", "seed", "ckpt_path",
         "recipe", "trainer")  # fmt: skip


def config_cell_id(root: DictConfig) -> str:
    """Return the id of the run that a composed config describes. Prepares the data first if the config states how."""
    from dlm.data.prepare.command import ensure_data

    for group in GROUPS:
        if root.get(group) is None:
            raise unknown(group, None, choices(group))
    check_keys(OmegaConf.to_container(root, resolve=False))  # type: ignore[arg-type]
    nodes = {name: root[name] for name in NODES}
    config = fill(
        {
            name: OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
            for name, node in nodes.items()
        }
    )
    data = ensure_data(config["data"])
    return cell_id(config, steps=derive(config).steps, data_hash=data.hash)


def check_sweep_name(name: str) -> str:
    """Return ``name``. Raises UserError if it cannot be the name of a folder in workdir/."""
    if not re.fullmatch(SWEEP_NAME, str(name)):
        raise UserError(f"sweep is {name!r}: {SWEEP_NAME_WORDS}")
    return str(name)


def check_choices(words: Iterable[str]) -> None:
    """Raise UserError for an override that sets a group to null, which Hydra does not accept."""
    for word in words:
        group, _, choice = word.lstrip("+").partition("=")
        if choice == "null" and choices(group):
            raise unknown(group, None, choices(group))


def register(*, anew: bool = False) -> None:
    """Register dlm's resolvers with OmegaConf and dlm's launchers with Hydra.

    Args:
        anew: Whether these launchers train runs anew that are done.
    """
    from dlm.submit import hydra as submit_hydra

    OmegaConf.register_new_resolver("dlm.workdir", lambda: str(paths.workdir()), replace=True)
    OmegaConf.register_new_resolver("dlm.data_dir", lambda: str(paths.data_dir()), replace=True)
    OmegaConf.register_new_resolver("dlm.sweep_name", check_sweep_name, replace=True)
    OmegaConf.register_new_resolver("dlm.cell_id", lambda *, _root_: config_cell_id(_root_), replace=True)
    submit_hydra.register(sys.argv[1:], anew=anew)
    for name, ours in MODELS.items():
        ConfigStore.instance().store(group="model", name=name, node=load_choice("model", ours))


def check_cell(config: dict[str, Any]) -> None:
    """Raise UserError if W&B refuses a name, a planned cell has another id now, or +cell names no planned cell."""
    check_names(config.get("logger"), sweep=config["sweep"], cell_id=config["cell_id"])
    planned = config.pop("planned_cell_id", None)
    if planned is not None and planned != config["cell_id"]:
        raise UserError(
            f"cell {planned} composes to {config['cell_id']}: its config, configs/ or its data changed since the plan; "
            "plan again or restore them"
        )
    if "cell" in HydraConfig.get().runtime.choices and planned is None:
        raise UserError("+cell named no planned cell: hydra.searchpath must hold the sweep's folder, with cell/ in it")


def explain(error: Exception) -> str | None:
    """Describe the user's mistake that caused an exception, in one line; None if the exception is a bug of dlm."""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return str(cause)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return str(instead_of(f"{group}={choice}") or unknown(group or "config", choice, choices(group)))
    if isinstance(error, ConfigCompositionException):
        *_, deepest = causes(error)
        if isinstance(deepest, (ConfigAttributeError, ConfigKeyError)):
            return _unknown_key(str(deepest.full_key))
        return " ".join(f"{error} {deepest if deepest is not error else ''}".split())
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        *_, deepest = causes(error)  # a resolver may have failed to read or write a file
        if isinstance(deepest, OSError) and (of_disk := explain_os_error(deepest)):
            return of_disk
    if isinstance(error, OmegaConfBaseException):
        from dlm.submit.config_files import explain_omegaconf

        return explain_omegaconf(error)
    if isinstance(error, HydraException):
        return " ".join(str(error).split())
    return explain_os_error(error) if isinstance(error, OSError) else None


def _unknown_key(key: str) -> str:
    """Return the message for an override of a key that the config does not have."""
    if key.startswith("hydra.launcher."):
        from dlm.submit.job import unknown_setting

        return str(unknown_setting(key.removeprefix("hydra.launcher.")))
    if (error := instead_of(key)) is not None:
        return str(error)
    with hydra.initialize_config_dir(str(paths.configs_dir()), version_base=None):
        base = OmegaConf.to_container(hydra.compose("config"), resolve=False)
    assert isinstance(base, dict)
    known = set(dotted_keys())
    owner, _, argument = key.rpartition(".")
    if (owner == "trainer" and key in known) or takes(OmegaConf.select(OmegaConf.create(base), owner), argument):
        return f"{key} is not in the config yet: add it with a plus, +{key}=VALUE"
    of_any_choice = {name for name in known if not name.startswith("trainer.")}
    if key in of_any_choice:
        group = key.partition(".")[0]
        return f"{key} is not in the chosen {group}: choose another with {group}=NAME, or leave the key out"
    known |= set(_keys(base))
    at_the_top = f"allowed at the top are {', '.join(map(str, base))}"
    return f"unknown key '{key}': {hint(key, known, otherwise=at_the_top)}"


def _keys(node: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a nested mapping."""
    for name, value in node.items():
        yield prefix + str(name)
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def is_first_process() -> bool:
    """Return whether this process prints for all processes of a run, under srun, torchrun, Lightning or alone."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_PROCID", "RANK"))


def exit_code_of(error: Exception, *, everywhere: bool = False) -> ExitCode:
    """Print the user's mistake behind ``error`` and return its exit code. Raises ``error`` if it is a bug of dlm."""
    line = explain(error)
    if line is None:
        raise error
    if is_first_process() or everywhere:
        print(f"dlm: {printable(line)}", file=sys.stderr)
    is_held = any(isinstance(cause, HeldError) for cause in causes(error))
    if is_held and "DLM_SUBMISSION" in os.environ:  # the job has to wait for another one; its cell is fine
        return ExitCode.PREEMPTED
    if isinstance(error, OSError) and "DLM_SUBMISSION" in os.environ:  # of this node or this moment: try again
        return ExitCode.BUG
    return ExitCode.USER_ERROR


def preload() -> None:
    """Import what runs need, for a process that forks several of them (dlm.submit.forks)."""
    # W&B imports this when a run begins, which takes several times longer after torch is imported. It is a private
    # module: another version of W&B may not have it, and then imports what it needs later.
    with contextlib.suppress(ImportError):
        importlib.import_module("wandb.sdk.launch.inputs.internal")
    register()
    from dlm.train import run, wandb_logger  # noqa: F401


def train(config: Mapping[str, Any], *, anew: bool) -> ExitCode:
    """Train one run, unless it is done.

    Args:
        config: The composed config, resolved and filled (dlm.core.recipe.fill).
        anew: Whether to move the directory of a run that is done to set_aside/, and train it again.

    Raises:
        UserError: The config does not describe a valid run, or another process runs it.
    """
    if sys.stderr.isatty() and is_first_process():
        print("starting torch ...", file=sys.stderr, flush=True)  # at once: the imports below take seconds
    from dlm.train.before import checked, nothing_to_train, result_before

    recipe, data_set = checked(config)
    result = result_before(config, recipe)
    if result is not None and not anew:
        print(nothing_to_train(result, recipe))
        return ExitCode.DONE
    run_dir = Path(config["paths"]["run_dir"])
    earlier = None if result is None else _set_aside(run_dir, result)
    from dlm.train.run import run

    try:
        code = run(config, recipe, data_set)
        if is_first_process() and (run_dir / "status.json").is_file():  # a development run keeps nothing
            print(f"run directory: {run_dir}")
        return code
    except UserError:
        if earlier is not None and not any(run_dir.glob("checkpoints/*")):
            _put_back(earlier, run_dir)
        raise


def _set_aside(run_dir: Path, result: Result) -> Path:
    """Move the directory of a run that is done, but leave there what Hydra has just written about the new run."""
    earlier = set_aside(run_dir)
    print(in_words(earlier, result))
    if (earlier / ".hydra").is_dir():
        run_dir.mkdir(exist_ok=True)
        (earlier / ".hydra").rename(run_dir / ".hydra")
    return earlier


def _put_back(earlier: Path, run_dir: Path) -> None:
    """Exchange a run that this machine refused to train, for its devices or packages, for the one that was done."""
    refused = set_aside(run_dir)
    if (refused / ".hydra").is_dir():
        (refused / ".hydra").rename(earlier / ".hydra")
    earlier.rename(run_dir)
    print(f"nothing was trained, so {run_dir.name} is back in its place; the attempt is now in {refused}")


def _check_alone() -> None:
    """Raise UserError for --rerun if srun or torchrun has started several processes, of which one would move the run.

    The others would take the run for done or for unfinished, depending on when they look.
    """
    number = max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if number > 1:
        raise UserError(
            f"{RERUN} is for one process, and {number} were started: use -m with hydra/launcher=submitit_slurm, or "
            "move the folder of the run away yourself"
        )


def main() -> int:
    """Compose the config and train. Return the exit code of the run; of a multirun, the first one that is not 0.

    The exit code is INTERRUPTED after a Ctrl-C that comes before the run keeps a record.
    """
    with signals.interrupted_by_ctrl_c():
        try:
            return _main()
        except BaseException as error:
            if not signals.is_end_by_ctrl_c(error):
                raise
            return ExitCode.INTERRUPTED


def _main() -> int:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors, and exit_code_of prints them
    anew = RERUN in sys.argv[1:]
    try:
        # The processes that Lightning starts for further devices get the words that are left.
        sys.argv[1:] = [word for word in classes.take_flags(sys.argv[1:]) if word != RERUN]
        if anew:
            _check_alone()
    except UserError as error:
        return exit_code_of(error)
    register(anew=anew)
    codes: list[int] = []

    def task(root: DictConfig) -> None:
        try:
            config: dict[str, Any] = OmegaConf.to_container(root, resolve=True)  # type: ignore[assignment]
            check_cell(config)
            classes.check_classes(config)
            codes.append(train(fill(config), anew=anew))
        except Exception as error:
            codes.append(exit_code_of(error))

    from dlm.submit.combinations import check_combinations

    try:
        check_override_extents(sys.argv[1:])
        check_choices(sys.argv[1:])
        if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv[1:]):
            check_combinations(sys.argv[1:])
        hydra.main(version_base=None, config_path=str(paths.configs_dir()), config_name="config")(task)()
    except Exception as error:
        codes.append(exit_code_of(error, everywhere=True))  # only this process may lack the data or a path
    return next((code for code in codes if code), ExitCode.DONE)


if __name__ == "__main__":
    exit_code = main()
    signals.ignore()
    sys.exit(exit_code)
