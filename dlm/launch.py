"""launch: `python -m dlm.launch [overrides]` -> one run, or with -m any Hydra multirun. Thin; train does the work.

Torch and Lightning are imported only when a run starts: composing, naming and submitting runs stays quick.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlm.core import paths, signals
from dlm.core.checks import check_keys, dotted_keys
from dlm.core.configs import choices
from dlm.core.errors import ExitCode, UserError, close_matches
from dlm.core.identity import SWEEP_NAME
from dlm.core.lease import HeldError

if __name__ == "__main__" and "DLM_SUBMISSION" in os.environ:
    signals.remember()  # a submitted run can be told to stop while the imports below go on


NODES = (
    "model",
    "data",
    "objective",
    "optimizer",
    "scheduler",
    "training",
    "validation",
    "seed",
    "ckpt_path",
    "recipe",
    "trainer",
)


def config_cell_id(root: DictConfig) -> str:
    """The id of the run that a composed config describes; prepares the data where the config says how."""
    from dlm.core.identity import cell_id
    from dlm.core.recipe import derive, fill
    from dlm.data.prepare.command import ensure_data

    check_keys(OmegaConf.to_container(root, resolve=False))  # type: ignore[arg-type]
    nodes = {name: root[name] for name in NODES}
    config: dict[str, Any] = {
        name: OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
        for name, node in nodes.items()
    }
    config = fill(config)
    data = ensure_data(config["data"])
    return cell_id(config, steps=derive(config).steps, data_hash=data.hash)


def check_sweep_name(name: str) -> str:
    """The folder of a run under workdir/, which must be one."""
    if not re.fullmatch(SWEEP_NAME, str(name)):
        raise UserError(f"sweep is {name!r}: allowed are letters, digits, '_', '.' and '-', a letter or digit first")
    return str(name)


def register() -> None:
    """Tell OmegaConf dlm's resolvers and Hydra dlm's launchers."""
    from dlm.submit import hydra as submit_hydra

    OmegaConf.register_new_resolver("dlm.workdir", lambda: str(paths.workdir()), replace=True)
    OmegaConf.register_new_resolver("dlm.data_dir", lambda: str(paths.data_dir()), replace=True)
    OmegaConf.register_new_resolver("dlm.sweep_name", check_sweep_name, replace=True)
    OmegaConf.register_new_resolver("dlm.cell_id", lambda *, _root_: config_cell_id(_root_), replace=True)
    submit_hydra.register()


def check_cell(config: dict[str, Any], root: DictConfig) -> None:
    """Refuse a planned cell whose config no longer has the id that it was planned with."""
    planned = config.pop("planned_cell_id", None)
    if planned is not None and planned != config["cell_id"]:
        raise UserError(
            f"cell {planned} composes to {config['cell_id']}: its config, configs/ or its data changed since the plan; "
            "plan again or restore them"
        )
    from hydra.core.hydra_config import HydraConfig

    if "cell" in HydraConfig.get().runtime.choices and planned is None:
        raise UserError("+cell named no planned cell: hydra.searchpath must hold the sweep's folder, with cell/ in it")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: Exception) -> str | None:
    """The user's mistake behind an exception in one line; None when it is our bug."""
    for cause in causes(error):
        if isinstance(cause, UserError):
            return str(cause)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        near = close_matches(choice, choices(group))
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"unknown {group or 'config'} '{choice}': {hint}allowed: {', '.join(choices(group))}"
    if isinstance(error, ConfigCompositionException) and "To append to your config" in str(error):
        key = str(error).split("'")[1]
        return f"unknown key '{key}'{_near_keys(key)}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        deepest = list(causes(error))[-1] if isinstance(error, ConfigCompositionException) else error
        return " ".join(f"{error} {deepest if deepest is not error else ''}".split())
    return None


def _near_keys(key: str) -> str:
    """The close matches of a key that an override named, else what is at the top."""
    with hydra.initialize_config_dir(str(paths.configs_dir()), version_base=None):
        base = OmegaConf.to_container(hydra.compose("config"), resolve=False)
    assert isinstance(base, dict)
    near = close_matches(key, {*_keys(base), *dotted_keys()})
    return f": did you mean {' or '.join(near)}?" if near else f": allowed at the top are {', '.join(map(str, base))}"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield prefix + str(name)
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def first_process() -> bool:
    """Whether this is the process of a run that speaks for all: under srun, torchrun, Lightning, or alone."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "SLURM_PROCID", "RANK"))


def main() -> int:
    """Compose and run; the exit code is that of the run, or of the first run of a multirun that did not end well."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises, and what is shown is ours to say
    register()
    codes: list[int] = []

    def task(root: DictConfig) -> None:
        try:
            config: dict[str, Any] = OmegaConf.to_container(root, resolve=True)  # type: ignore[assignment]
            check_cell(config, root)
            from dlm.core.recipe import fill
            from dlm.train.run import run

            codes.append(run(fill(config)))
        except Exception as error:  # a callback's own complaint comes inside one of Hydra's
            line = explain(error)
            if line is None:
                raise
            if first_process():  # the other processes of a run come to the same
                print(f"dlm: {line}", file=sys.stderr)
            held = any(isinstance(cause, HeldError) for cause in causes(error))
            later = held and "DLM_SUBMISSION" in os.environ  # a job waits for its turn: nothing is wrong with the cell
            codes.append(ExitCode.PREEMPTED if later else ExitCode.USER_ERROR)

    try:
        hydra.main(version_base=None, config_path=str(paths.configs_dir()), config_name="config")(task)()
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"dlm: {line}", file=sys.stderr)
        return ExitCode.USER_ERROR
    if ExitCode.PREEMPTED in codes:  # saved and said: a second signal while the interpreter ends would be the last word
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    return next((code for code in codes if code), ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
