"""Read Hydra's YAML files with the checks of dlm's own reader, and say in one line what is wrong with a config."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource as HydrasFileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf.errors import OmegaConfBaseException

from dlm.core.classes import PLUGINS, check_classes
from dlm.core.configs import load_mapping, yaml_problem
from dlm.core.data_only import check_cell_file
from dlm.core.errors import UserError, shown

CELLS = "cell"  # the folder of the planned cells, in the folder of a sweep


class FileConfigSource(HydrasFileConfigSource):
    """Hydra's source of config files: configs/, --config-dir and file:// folders of hydra.searchpath."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file.

        Raises UserError, which names the file, if dlm's reader refuses it, if it names a class that is not allowed, or
        if it is a file of a sweep's folder that does more than describe a planned cell.
        """
        path = Path(self.path) / self._normalize_file_name(config_path)
        if path.is_file():
            content = load_mapping(path, may_be_empty=True)
            _check_defaults(path, content.get("defaults"))
            check_classes(content, source=str(path), also=[PLUGINS])
            if (Path(self.path) / CELLS).is_dir():
                _check_of_sweep(path, content)
        try:
            return super().load_config(config_path)
        except yaml.YAMLError as error:  # a tag or a merge that OmegaConf reads in another way
            raise UserError(f"{path}{yaml_problem(error)}") from error


def _check_of_sweep(path: Path, content: dict[str, Any]) -> None:
    """Raise UserError for a file of a sweep's folder, which jobs search for cells only, that is no planned cell."""
    if path.parent.name != CELLS:
        raise UserError(f"{path} lies in the folder of a sweep, which holds plans and no configs: move it to configs/")
    check_cell_file(content, str(path))


def _check_defaults(path: Path, defaults: Any) -> None:
    """Raise UserError if the defaults are no list, or override a group twice; Hydra passes over the second choice."""
    if not isinstance(defaults, list | None):
        raise UserError(f"{path}: defaults is {shown(defaults)}: it must be a list")
    names = [str(name) for item in defaults or () if isinstance(item, dict) for name in item]
    for name, times in Counter(names).items():
        if times > 1:
            raise UserError(f"{path} has '{name}' {times} times in its defaults: keep one of them")


def explain_omegaconf(error: OmegaConfBaseException) -> str:
    """Describe an error of OmegaConf in one line: the key and what is wrong with it."""
    said = str(error).splitlines()[0]
    return f"{error.full_key}: {said}" if error.full_key else said


def register() -> None:
    """Let Hydra read files by this source. Hydra 1.3 has no public way to replace one."""
    Plugins.instance()  # registers Hydra's own sources
    sources: dict[str, Any] = SourcesRegistry.instance().types
    sources[FileConfigSource.scheme()] = FileConfigSource
