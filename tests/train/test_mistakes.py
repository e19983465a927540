"""A mistake of the user is one line and exit code 2."""

import numpy as np
import pytest
from support.runs import SHORT, TINY

from dlm.core.lease import Lease
from dlm.data.packed import write_packed
from dlm.data.prepare.command import index_packed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model=171M",), ("unknown model '171M'", "did you mean 170M")),
        (("objective=masked_difusion",), ("unknown objective", "did you mean masked_diffusion?")),
        (("experiment=debgu",), ("unknown experiment", "did you mean debug")),
        ((*SHORT, "optimizer.lrr=1e-3"), ("optimizer.lrr", "did you mean optimizer.lr")),
        ((*SHORT, "training.step=40"), ("training.step", "did you mean training.steps")),
        ((*SHORT, "scheduler.name=cosin"), ("scheduler.name", "did you mean cosine")),
        ((*SHORT, "callbacks.record.spike=x"), ("record.spike is 'x'", "from 0")),
        ((*SHORT, "callbacks.checkpoint.every_n_steps=0"), ("checkpoint.every_n_steps is 0", "at least 1")),
        ((*SHORT, "callbacks.checkpoint.mode=least"), ("checkpoint.mode 'least'", "allowed: min, max")),
        ((*SHORT, "callbacks.checkpoint.asynchronous=maybe"), ("checkpoint.asynchronous is 'maybe'", "true and false")),
        ((*SHORT, "trainer.devices=3"), ("8", "3 devices", "data.batch_size", "trainer.devices")),
        ((*SHORT, "data.micro_batch_size=3"), ("micro_batch_size 3", "8 sequences")),
        (("experiment=debug", "training.steps=null", "training.budget=1e9"), ("fewer than 20", "training.budget")),
        (("experiment=debug", "training.steps=null", "training.budget=-1"), ("training.budget", "-1", "above zero")),
        (("experiment=debug", "training.steps=null"), ("training.budget", "training.steps")),
        ((*SHORT, "training.steps=0"), ("training.steps", "0", "at least 1")),
        ((*SHORT, "model=6M"), ("vocab_size 32000", "256", "stdlib")),
        ((*SHORT, "data.block_size=512"), ("data.block_size 512", "256", "model.block_size")),
        ((*SHORT, "data=slim_pajama"), ("no prepared data", "dlm prepare packed", "data.data_dir")),
        ((*SHORT, "+trainer.max_steps=7"), ("trainer.max_steps", "training.steps")),
        ((*SHORT, "+trainer.no_such=7"), ("unknown key of trainer 'no_such'",)),
        ((*SHORT, "+trainer.gradient_clip_algorithm=no_such"), ("trainer.gradient_clip_algorithm 'no_such'", "norm")),
        ((*SHORT, "trainer.precision=bf16"), ("trainer.precision", "did you mean bf16-")),
        ((*SHORT, "optimizer.name=adam"), ("optimizer.name", "did you mean adamw")),
        ((*SHORT, "optimizer.decay=some"), ("optimizer.decay 'some'", "allowed: all, matrices")),
        ((*SHORT, "trainer.attention=flesh"), ("trainer.attention 'flesh'", "did you mean flash")),
        ((*SHORT, "trainer.strategy=fsdp3"), ("trainer.strategy 'fsdp3'", "did you mean fsdp or fsdp2")),
        ((*SHORT, "trainer.devices=auto"), ("trainer.devices is 'auto'", "at least 1")),
        ((*SHORT, "trainer.devices=null"), ("trainer.devices is null", "at least 1")),
        ((*SHORT, "trainer.attention=null"), ("trainer.attention null", "allowed: ")),
        ((*SHORT, "objective.weight=null"), ("objective.weight null", "elbo")),
        ((*SHORT, "validation.estimator=null"), ("validation.estimator null", "exact_count")),
        ((*SHORT, "scheduler.decay_fraction=.5"), ("decay_fraction is not in the chosen scheduler",)),
        ((*SHORT, "objective.eps=2"), ("objective.eps is 2", "to 0.999")),
        ((*SHORT, "objective.weight=elb"), ("objective.weight 'elb'", "did you mean elbo")),
        ((*SHORT, "validation.estimator=exact"), ("validation.estimator", "exact_count")),
        ((*SHORT, "trainer.threads=-1"), ("trainer.threads is -1", "at least 1")),
        ((*SHORT, "trainer.compile=maybe"), ("trainer.compile is 'maybe'", "true and false")),
        ((*SHORT, "trainer.activation_checkpointing=1"), ("activation_checkpointing is 1", "true and false")),
        ((*SHORT, "training.budget=-4"), ("training.budget is -4", "above zero")),
        ((*SHORT, "sweep=../../x"), ("sweep is '../../x'", "allowed are letters")),
        (("experiment=debug", f"sweep={'s' * 120}"), ("logger.id is 'sss", "W&B allows 128", "name of the sweep")),
        (("experiment=debug", "logger.tags=['']"), ("logger.tags is ['']", "no empty tag")),
        (
            (*SHORT, "trainer.profiler=simple"),
            ("trainer.profiler is no key of dlm", "set profiler=simple"),
        ),
        ((*SHORT, "ckpt_path=/etc/hostname"), ("ckpt_path /etc/hostname cannot be read", "step_* folder")),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value[0], str) else None,
)
def test_a_mistake_is_refused_in_one_line_with_exit_code_2(overrides, words, launch, workdir):
    complaint = launch(*overrides).complaint
    assert all(word in complaint for word in words), complaint
    assert not list(workdir.glob("*/runs/*/checkpoints"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("split", "token"), [("train", 256), ("validation", -1)])
def test_a_token_beyond_the_vocabulary_is_refused_in_one_line(split, token, workers, launch, workdir, tmp_path):
    """In a file of the same size as the one that was indexed."""
    for name in ("train", "validation"):
        write_packed(tmp_path / f"{name}.bin", np.full(2048, 7, dtype=np.int16))
    index_packed(tmp_path, vocab_size=256, bos_id=0, tokenizer="none")
    write_packed(tmp_path / f"{split}.bin", np.full(2048, token, dtype=np.int16))
    data = (f"data.data_dir={tmp_path}", "data.prepare=null", f"data.num_workers={workers}")
    complaint = launch(*TINY, "training.steps=4", *data).complaint
    assert f"{tmp_path} holds token {token}, its vocabulary has 256: a file was replaced" in complaint


def test_a_running_run_is_not_started_twice(launch, trained):
    run_dir = trained
    (run_dir / "result.json").unlink()
    with Lease(run_dir):
        assert "is being run by process" in launch(*SHORT).complaint
    assert not (run_dir / "result.json").exists()
