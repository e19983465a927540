from .manifest import DataSet as DataSet
from .manifest import read_data as read_data
from .mixture import open_mixture as open_mixture
from .prepare.build import prepare_text as prepare_text
from .prepare.command import ensure_data as ensure_data
