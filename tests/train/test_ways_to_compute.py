"""Micro-batches, precisions and compilation change a run by rounding only."""

import pytest
import torch
from support.runs import SHORT, TINY, losses

from dlm.record.run import (
    read_result,
)
from dlm.train.checkpoint_files import damage
from dlm.train.models import encoder


def test_the_micro_batch_changes_a_run_by_rounding_only(launch, trained, workdir):
    assert launch(*SHORT, "data.micro_batch_size=2", f"paths.run_dir={workdir}/split").code == 0
    whole, split = losses(trained), losses(workdir / "split")
    assert whole.keys() == split.keys() == set(range(1, 41))
    for step, row in whole.items():
        assert split[step] == pytest.approx(row, rel=1e-5)
    assert whole != split  # they were two computations
    assert read_result(workdir / "split").cell_id == trained.name  # type: ignore[union-attr]


def test_a_profiler_and_a_precision_are_chosen_by_name(launch, trained, workdir, caplog):
    ended = launch(*SHORT, "profiler=simple", "trainer.precision=bf16-mixed", f"paths.run_dir={workdir}/rough")
    assert ended.code == 0 and "run_training_batch" in ended.err + caplog.text  # the profiler's table
    rough, exact = losses(workdir / "rough"), losses(trained)
    assert rough[1] != exact[1] and rough[1]["train/loss"] == pytest.approx(exact[1]["train/loss"], rel=0.01)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])  # in C++: a minute
def test_a_compiled_run_computes_the_same(backend, launch, workdir, monkeypatch):
    compiled = []

    def look(loss, plain=torch.compile, **options):
        result = plain(loss, backend=backend, **options)

        def counted(*given):
            compiled.append(given)
            return result(*given)

        return counted

    settings = (*TINY, "training.steps=4", "validation.num_sequences=4", "validation.times=1")
    assert launch(*settings, f"paths.run_dir={workdir}/plain").code == 0
    monkeypatch.setattr(torch, "compile", look)
    assert launch(*settings, f"paths.run_dir={workdir}/compiled", "trainer.compile=true").code == 0
    assert len(compiled) >= 5  # four steps and a validation
    a, b = losses(workdir / "plain"), losses(workdir / "compiled")
    assert a.keys() == b.keys()
    for step, row in a.items():
        assert b[step] == pytest.approx(row, rel=1e-4)
    assert damage(workdir / "compiled" / "checkpoints" / "step_00000004") is None


def test_a_run_in_bf16_true_keeps_its_rotary_tables_in_float32(launch, trained, workdir, monkeypatch):
    seen = set()
    plain = encoder.Block.forward

    def look(self, x, cos, sin, causal):
        seen.add((x.dtype, self.mlp.down.weight.dtype, cos.dtype, sin.dtype))
        return plain(self, x, cos, sin, causal)

    monkeypatch.setattr(encoder.Block, "forward", look)
    assert launch(*SHORT, "trainer.precision=bf16-true", f"paths.run_dir={workdir}/rough").code == 0
    assert seen == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)}
    rough, exact = losses(workdir / "rough"), losses(trained)
    assert rough[1] != exact[1] and rough[1]["train/loss"] == pytest.approx(exact[1]["train/loss"], rel=0.01)
    assert rough[40]["val/loss"] < rough[10]["val/loss"]  # it learns, if less
