from .figures import allocation_figure as allocation_figure
from .figures import isoflop_figure as isoflop_figure
from .look import budget_colours as budget_colours
from .look import drawing as drawing
from .page import tables as tables
from .page import write_fits as write_fits
from .page import write_report as write_report
