from .figures import allocation_figure as allocation_figure
from .figures import isoflop_figure as isoflop_figure
from .page import tables as tables
from .page import write_fits as write_fits
from .page import write_report as write_report
