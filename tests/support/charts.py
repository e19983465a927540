"""What the tests of charts ask of a chart."""

import json

import numpy as np

from dlm.report.interactive import as_plotly


def num_bytes(chart):
    """Return how many bytes the description of a chart for plotly adds to the page."""
    return len(json.dumps(as_plotly(chart)).encode())


def named(panel, name):
    """Return the series of a panel with a name in the legend."""
    (found,) = [one for one in panel.series if one.name == name]
    return found


def points(panel):
    """Return x, y and hover text of all points of a panel, without lines and bars."""
    marks = [one for one in panel.series if one.mark == "point"]
    x, y = (np.concatenate([getattr(one, axis) for one in marks]) for axis in "xy")
    return x, y, [text for one in marks for text in one.hover]


def is_whole(chart):
    """Check that the sequences of each series are equally long."""
    for panel in chart.panels:
        for one in panel.series:
            length = len(one.x)
            assert len(one.y) == length and len(one.hover) in (0, length)
            for ends in (one.low, one.high, one.low_x, one.high_x):
                assert ends is None or len(ends) == length
        if panel.contours is not None:
            assert np.shape(panel.contours.z) == (len(panel.contours.y), len(panel.contours.x))
    return True
