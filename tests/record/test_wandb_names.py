"""Names that W&B does not accept are found before anything is trained, and tags are cut to what it accepts."""

import pytest
from support.by_hand import planned

from dlm.core.errors import UserError
from dlm.record.wandb import MOST_CHARACTERS, check_names, fitting_tags


def test_a_sweep_whose_runs_wandb_would_refuse_is_refused_by_the_plan(tmp_path, monkeypatch):
    _, plan = planned(tmp_path / "whole", monkeypatch)
    most = MOST_CHARACTERS - 1 - max(len(cell.cell_id) for cell in plan.cells)
    planned(tmp_path / "longest", monkeypatch, name="a" * most)
    with pytest.raises(UserError, match="of 129 characters: W&B allows 128, so shorten the name of the sweep"):
        planned(tmp_path / "longer", monkeypatch, name="a" * (most + 1))
    with pytest.raises(UserError, match=r"logger\.group is 'ggg.* of 129 characters: W&B allows 128, so shorten it"):
        planned(tmp_path / "group", monkeypatch, set={"logger.group": "g" * 129})


@pytest.mark.parametrize(
    ("logger", "words"),
    [
        ({"id": "${sweep}-${cell_id}"}, r"logger\.id is 's-a:b': W&B allows none of :;,#\?/' in it, so remove :"),
        ({"id": "x", "project": "me/mine"}, r"logger\.project is 'me/mine': .* so remove /"),
        ({"id": "x", "name": "n" * 200}, r"logger\.name is .* of 200 characters"),
    ],
)
def test_a_name_that_wandb_refuses_is_a_mistake_in_one_line(logger, words):
    with pytest.raises(UserError, match=words):
        check_names(logger, sweep="s", cell_id="a:b")
    check_names(None, sweep="s" * 200, cell_id="a")  # without W&B nothing limits it


def test_a_long_tag_is_cut_so_that_it_still_differs_from_others():
    whole = "d" * 64
    first, second = fitting_tags([whole + "1", whole + "2"])
    assert len(first) == len(second) == 64 and first != second and first[:55] == second[:55] == whole[:55]
    assert fitting_tags(["mdm", whole, 7]) == ["mdm", whole, "7"]
    assert fitting_tags("one") == ["one"] and fitting_tags(None) is None
    with pytest.raises(UserError, match=r"logger\.tags is \['mdm', ''\]: W&B allows no empty tag"):
        fitting_tags(["mdm", ""])
