"""Read the launcher that a command names: a file of configs/hydra/launcher, with the settings of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core.configs import choices
from dlm.core.errors import UserError, causes, unknown
from dlm.core.limits import check_override_extents
from dlm.core.paths import configs_dir
from dlm.submit.job import LAUNCHERS, slurm_settings, unknown_setting
from dlm.submit.local import LocalPool, local_settings
from dlm.submit.overrides import quote
from dlm.submit.slurm import Slurm, slurm_answers

if TYPE_CHECKING:
    from omegaconf import DictConfig

SLURM, LOCAL = "submitit_slurm", "submitit_local"
LAUNCHER_KEY = "hydra.launcher."


def chosen(launcher: str) -> str:
    """Return the name of a launcher; for ``auto``, that of SLURM if a controller answers, otherwise of this machine.

    Raises UserError for a name that no file has.
    """
    if launcher == "auto":
        return SLURM if slurm_answers() else LOCAL
    known = choices("hydra/launcher")
    if launcher not in known:
        raise unknown("launcher", launcher, ["auto", *known])
    return launcher


def is_local(launcher: str) -> bool:
    """Whether the cells of a chosen launcher run on this machine."""
    if launcher in (LOCAL, SLURM):
        return launcher == LOCAL
    target = _composed(launcher, ()).get("_target_")
    if target is None:
        raise UserError(f"launcher {launcher} has no _target_: let its defaults name submitit_slurm or submitit_local")
    return str(target).endswith("LocalLauncher")


def pool_of(launcher: str, sweep: Path) -> LocalPool:
    """Return this machine as the file of a launcher describes it.

    Raises UserError for an unknown key or a value that is not allowed.
    """
    return LocalPool.of(local_settings(_values(launcher, (), sweep)))


def slurm_of(words: Sequence[str], *, allow_dirty: bool, launcher: str = SLURM, sweep: Path | None = None) -> Slurm:
    """Return the SLURM cluster with the settings of a launcher's file.

    Args:
        words: Settings that take precedence, in the form ``hydra.launcher.KEY=VALUE``; other words are passed over.
        allow_dirty: Allow jobs with uncommitted code.
        launcher: The name of the launcher.
        sweep: The folder of the sweep, for files that name other folders by ``${hydra.sweep.dir}``.

    Raises:
        UserError: A setting is not in Hydra's grammar, its key is unknown, or its value is not allowed.
    """
    words = [word for word in words if word.lstrip("+").startswith(LAUNCHER_KEY)]
    for word in words:
        if word.lstrip("+").startswith(f"{LAUNCHER_KEY}_target_="):
            raise UserError(
                f"{word}: only `python -m dlm.launch -m` can use another class; choose a file with --launcher"
            )
    values = _values(launcher, [f"++{word.lstrip('+')}" for word in words], sweep)
    settings = slurm_settings({**values, "allow_dirty": allow_dirty or bool(values.get("allow_dirty"))})
    return Slurm(settings, file=f"{LAUNCHERS}/{launcher}.yaml")


def _values(launcher: str, overrides: Sequence[str], sweep: Path | None) -> dict[str, Any]:
    """Return the keys of a launcher and their values. Raises UserError for an error of Hydra, in one line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values: Any = OmegaConf.to_container(_composed(launcher, overrides, sweep=sweep), resolve=True)
    except OmegaConfBaseException as error:
        raise _one_line(launcher, error) from error
    return dict(values)


def _composed(launcher: str, overrides: Sequence[str], *, sweep: Path | None = None) -> DictConfig:
    """Return the config node of a launcher as Hydra composes it for `-m`. Its interpolations need the sweep's folder.

    Raises UserError for an error of Hydra, in one line.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from dlm.submit.hydra import register

    register()
    names = ["hydra.job.name=launch"]  # as with `python -m dlm.launch`
    if sweep is not None:
        names += [f"sweep={quote(sweep.name)}", f"hydra.sweep.dir={quote(str(sweep.absolute() / 'runs'))}"]
    try:
        with hydra.initialize_config_dir(str(configs_dir()), version_base=None):
            check_override_extents(overrides)
            words = [f"hydra/launcher={launcher}", *names, *overrides]
            config = hydra.compose("config", overrides=words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _one_line(launcher, error) from error
    node: DictConfig = config.hydra.launcher
    return node


def _one_line(launcher: str, error: Exception) -> UserError:
    """Return the user's error behind an error of Hydra or OmegaConf."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    from dlm.submit.config_files import explain_omegaconf

    of_key = next((cause for cause in causes(error) if isinstance(cause, OmegaConfBaseException)), None)
    if of_key is None:
        return UserError(f"launcher {launcher}: {' '.join(str(error).split())}")
    key = str(of_key.full_key or "")
    if isinstance(of_key, (ConfigAttributeError, ConfigKeyError)) and key.startswith(LAUNCHER_KEY):
        return unknown_setting(key.removeprefix(LAUNCHER_KEY))
    return UserError(f"launcher {launcher}: {explain_omegaconf(of_key)}")
