"""qlora/training/trainer.py and step_check.py: values that are not finite, out-of-memory errors, evaluation."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SAVE_STEPS, STEPS, error_of, flags_of, history, run_main, write_json
from transformers import TrainerControl

import train_qlora
from chatglm import ChatGLMForConditionalGeneration
from qlora.data.batching import SourceRow, StepBatch
from qlora.errors import TrainingStopped
from qlora.training import trainer as trainer_module
from qlora.training.checkpoints import STAGING, checkpoints
from qlora.training.step_check import MOST_SKIPPED, Step, StepCheck, name_rows
from qlora.training.trainer import LogBeforeSaving, QLoRATrainer

LINE = 12  # of the row that causes the problem


@pytest.fixture
def flags(tiny_checkpoint, train_file, dev_file, tmp_path) -> Callable[..., list[str]]:
    """A function (name, values of the JSON) -> the flags of a run that writes to a folder of this name."""

    def make(name: str = "out", evaluate: bool = True, **values) -> list[str]:
        args_json = write_json(tmp_path / f"{name}.json", tmp_path / name, **values)
        return flags_of(args_json, tiny_checkpoint, train_file, dev_file if evaluate else "none")

    return make


@pytest.fixture
def change_output(monkeypatch) -> Callable[[Callable], None]:
    """Installs a function (model, output, inputs) that is called after each forward pass and may change the output."""
    forward = ChatGLMForConditionalGeneration.forward

    def install(change: Callable):
        def changed(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            change(self, output, kwargs)
            return output

        monkeypatch.setattr(ChatGLMForConditionalGeneration, "forward", changed)

    return install


# Values that are not finite.


@pytest.fixture
def lines_of_steps(monkeypatch) -> dict[int, list[int]]:
    """Step -> the lines of its rows, filled while training runs; under 0 those of the latest micro-batch."""
    lines, model_inputs = defaultdict(list), QLoRATrainer.model_inputs

    def record_lines(self, samples):
        lines[0] = [sample["line"] for sample in samples]
        lines[self.state.global_step + 1] += lines[0]
        return model_inputs(self, samples)

    monkeypatch.setattr(QLoRATrainer, "model_inputs", record_lines)
    return lines


def scale(factor: float) -> Callable:
    """Multiplies loss and gradient by a factor."""
    return lambda output: setattr(output, "loss", output.loss * factor)


def scale_gradient(factor: float) -> Callable:
    """Multiplies only the gradient by a factor."""
    return lambda output: output.loss.register_hook(lambda gradient: gradient * factor)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (scale(float("nan")), "the loss is nan"),
        (scale(float("inf")), "the loss is inf"),
        (scale_gradient(float("inf")), "the gradient is not finite (its norm is "),
        (scale_gradient(float("nan")), "the gradient is not finite (its norm is nan), while the loss is "),
    ],
)
def test_step_that_is_not_finite_is_reported_with_its_rows(
    flags, change_output, lines_of_steps, tmp_path, change, problem
):
    change_output(lambda model, output, inputs: change(output) if LINE in lines_of_steps[0] else None)
    # The check is made at every third step, when steps after the one with the problem have been trained.
    message = error_of(train_qlora, *flags(evaluate=False, logging_steps=3, save_steps=3, max_steps=6))
    step = next(step for step, lines in lines_of_steps.items() if step and LINE in lines)
    assert 3 < step < 6
    assert f"step {step} (learning rate 0.0" in message and problem in message
    lines = sorted(lines_of_steps[step])
    assert len(lines) == 8 and f"on lines {', '.join(map(str, lines))} of the training data" in message
    assert f"{tmp_path / 'out' / 'checkpoint-3'} is whole: go on from it" in message
    assert [checkpoint.name for checkpoint in checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_reported_lines_are_those_of_the_file(train_file, flags, lines_of_steps, tmp_path):
    # Empty lines are skipped, and counted as lines.
    rows = train_file.read_text(encoding="utf-8").splitlines()[:8]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + "\n\n".join(rows), encoding="utf-8")
    run_main(train_qlora, *flags(evaluate=False, max_steps=1), "--train_data_path", path)
    assert sorted(lines_of_steps[1]) == list(range(2, 17, 2))


def test_overflow_by_too_large_a_learning_rate(flags, tmp_path):
    values = {"learning_rate": 1e30, "warmup_ratio": 0, "logging_steps": 100}
    message = error_of(train_qlora, *flags(evaluate=False, save_strategy="no", **values))
    assert "step 2 (learning rate 8.75e+29): the loss is nan" in message
    assert message.endswith("There is no checkpoint yet.") and "kept" not in message
    assert checkpoints(tmp_path / "out") == []


def test_loss_of_zero_is_an_error(flags, change_output):
    change_output(lambda model, output, inputs: setattr(output, "loss", output.loss * 0))
    message = error_of(train_qlora, *flags(evaluate=False))
    assert "step 1" in message and "the loss is exactly zero" in message and "on lines " in message


def test_batch_without_label_tokens_is_an_error(flags, monkeypatch):
    monkeypatch.setattr(StepBatch, "collate", without_labels)
    message = error_of(train_qlora, *flags(evaluate=False))
    assert re.search(r"step 1 has no label tokens\. Its rows are on lines \d+(, \d+){7} of", message)


def without_labels(samples: list[dict]) -> StepBatch:
    tensors = [{name: torch.tensor(sample[name]) for name in ("input_ids", "labels")} for sample in samples]
    return StepBatch(
        [s | t | {"labels": torch.full_like(t["labels"], -100)} for s, t in zip(samples, tensors, strict=True)]
    )


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_evaluation_that_is_not_finite_is_an_error(flags, change_output, factor):
    change_output(lambda model, output, inputs: None if model.training else scale(factor)(output))
    message = error_of(train_qlora, *flags())
    assert f"the evaluation after step {SAVE_STEPS} has no loss: its sum is {factor}" in message


@pytest.mark.parametrize(("step", "advice"), [(2, "There is no checkpoint yet"), (6, "checkpoint-4 is whole: go on")])
def test_interrupted_run_names_its_newest_checkpoint(flags, monkeypatch, tmp_path, capsys, step, advice):
    training_step = QLoRATrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(QLoRATrainer, "training_step", interrupted)
    with pytest.raises(SystemExit) as raised:
        run_main(train_qlora, *flags())
    assert raised.value.code == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"interrupted after {step} steps. ") and advice in message
    assert not (tmp_path / "out" / STAGING).exists()


def test_training_without_effect_is_reported(flags, tmp_path, caplog):
    run_main(train_qlora, *flags(evaluate=False, learning_rate=0.0, max_steps=1))
    warnings = [record.message for record in caplog.records if "is untrained" in record.message]
    assert warnings[-1] == f"The adapter in {tmp_path / 'out'} is untrained: every lora_B is zero."
    assert all(STAGING not in message for message in warnings)


def step_check(*gradient_norms: float, scaler: object | None) -> StepCheck:
    check = StepCheck(SimpleNamespace(scaler=scaler, gather=lambda tensor: tensor), "out")
    for number, norm in enumerate(gradient_norms, 1):
        check.steps.append(Step(number, 0.1, [SourceRow("", "line", number)], torch.tensor(2.5), torch.tensor(norm)))
    return check


def test_steps_that_loss_scaling_skips_are_no_error():
    infinite = [float("inf")] * MOST_SKIPPED
    step_check(*infinite, 1.0, *infinite, scaler=object()).check()
    with pytest.raises(TrainingStopped, match=f"step {MOST_SKIPPED + 1} .* in {MOST_SKIPPED + 1} steps in a row"):
        step_check(*infinite, float("nan"), scaler=object()).check()
    with pytest.raises(TrainingStopped, match=r"step 2 .*the gradient is not finite"):
        step_check(1.0, *infinite, scaler=None).check()


def test_skipped_steps_are_counted_over_several_checks():
    check = step_check(*[float("inf")] * MOST_SKIPPED, scaler=object())
    check.check()
    check.steps += step_check(float("inf"), scaler=object()).steps
    with pytest.raises(TrainingStopped, match="steps in a row"):
        check.check()


def test_rows_of_several_files_are_named_by_file():
    samples = [{"line": 30, "element": 3, "file": "b.json"}, *({"line": n, "file": "a.jsonl"} for n in (7, 2))]
    rows = StepBatch(samples).source_rows
    assert name_rows(rows) == "Its rows are on lines 2, 7 of a.jsonl; elements 3 of b.json."


# Out-of-memory errors.


@pytest.fixture
def run_out_of_memory(change_output) -> Callable[[int, str, bool], None]:
    """Installs an out-of-memory error in a pass of the N-th micro-batch of training or evaluation."""

    def install(fails: int, where: str, training: bool = True):
        passes = 0

        def out_of_memory(gradient: torch.Tensor | None = None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

        def change(model, output, inputs):
            nonlocal passes
            passes += model.training == training
            if model.training == training and passes == fails:
                out_of_memory() if where == "forward" else output.loss.register_hook(out_of_memory)

        change_output(change)

    return install


def assert_same_run(one: Path, other: Path):
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    for key in ("loss", "grad_norm"):
        assert history(one, key) == history(other, key)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("fails", [1, 2])
def test_out_of_memory_in_a_step_is_repeated_with_smaller_micro_batches(
    flags, run_out_of_memory, tmp_path, caplog, fails, where
):
    run_out_of_memory(fails, where)
    run_main(train_qlora, *flags(evaluate=False), "--max_tokens", 400)
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith("CUDA out of memory after 0 steps: going on with at most ")
    (size,) = re.findall(r"(\d+) tokens at once", message)
    run_out_of_memory(0, where)
    run_main(train_qlora, *flags("smaller", evaluate=False), "--max_tokens", size)
    assert_same_run(tmp_path / "out", tmp_path / "smaller")


def test_out_of_memory_on_the_plain_path(flags, run_out_of_memory, tmp_path, caplog):
    run_out_of_memory(2, "backward")
    run_main(train_qlora, *flags(evaluate=False), "--plain")
    assert "going on with at most 2 rows at once" in caplog.text
    run_out_of_memory(0, "backward")
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run_main(train_qlora, *flags("smaller", evaluate=False, **smaller), "--plain")
    assert_same_run(tmp_path / "out", tmp_path / "smaller")


def test_out_of_memory_with_single_samples_ends_with_advice(flags, change_output):
    passes = []

    def change(model, output, inputs):
        passes.append(inputs["input_ids"].shape[1])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    change_output(change)
    message = error_of(train_qlora, *flags(evaluate=False))
    assert len(passes) > 2 and sorted(passes, reverse=True) == passes  # of decreasing size
    assert f"CUDA out of memory after 0 steps, with {passes[-1]} tokens at once" in message
    assert "lower --memory_budget" in message and "nvidia-smi" in message


def test_out_of_memory_in_a_step_of_several_processes_ends_with_advice():
    # The other processes wait for the gradients of one backward pass, so that it cannot be repeated.
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), args=SimpleNamespace(world_size=2), max_tokens=100)
    trainer.state = SimpleNamespace(global_step=3)
    micro_batches = [[{"input_ids": [1] * 40}, {"input_ids": [1] * 50}]]
    with pytest.raises(TrainingStopped, match="CUDA out of memory after 3 steps, with 90 tokens at once"):
        QLoRATrainer.shrink_micro_batches(trainer, micro_batches, "CUDA out of memory")
    trainer.model.training = False
    QLoRATrainer.shrink_micro_batches(trainer, micro_batches, "CUDA out of memory")
    assert trainer.max_tokens == 45


def test_out_of_memory_in_an_evaluation(flags, run_out_of_memory, tmp_path, caplog):
    run_main(train_qlora, *flags("whole"), "--lora_dropout", 0)
    run_out_of_memory(2, "forward", training=False)
    run_main(train_qlora, *flags(), "--lora_dropout", 0)
    assert f"CUDA out of memory after {SAVE_STEPS} steps: going on" in caplog.text
    losses = history(tmp_path / "out", "eval_loss")
    assert losses == pytest.approx(history(tmp_path / "whole", "eval_loss"), abs=1e-4)


# Evaluation.


@pytest.mark.parametrize("path_flags", [(), ("--plain",)])
def test_evaluation_keeps_no_logits_and_no_graph(flags, change_output, path_flags):
    evaluated = []

    def change(model, output, inputs):
        if not model.training:
            evaluated.append(inputs["input_ids"].shape)
            assert not output.loss.requires_grad
            assert path_flags or output.logits is None

    change_output(change)
    run_main(train_qlora, *flags(), *path_flags)
    assert evaluated


def test_training_is_the_same_with_and_without_evaluations(flags, tmp_path):
    run_main(train_qlora, *flags("with", eval_steps=1))
    run_main(train_qlora, *flags("without", evaluate=False))
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert len(history(tmp_path / "with", "eval_loss")) == STEPS


def test_rate_is_that_of_the_steps_since_the_last_log(flags, tmp_path, monkeypatch):
    seconds, tokens, train, evaluate = [0], [], QLoRATrainer.training_step, trainer_module.own_samples

    def training_step(self, model, inputs, *args):
        seconds[0] += 2
        tokens.append(inputs.num_tokens)
        return train(self, model, inputs, *args)

    def own_samples(*args):  # only an evaluation asks for them
        seconds[0] += 100
        return evaluate(*args)

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    monkeypatch.setattr(QLoRATrainer, "training_step", training_step)
    monkeypatch.setattr(trainer_module, "own_samples", own_samples)
    run_main(train_qlora, *flags(logging_steps=2, eval_steps=3, save_strategy="no", max_steps=6))
    logged = [tokens[:2], tokens[2:3], tokens[3:4], tokens[4:]]  # also before an evaluation
    expected = [round(sum(counts) / (2 * len(counts))) for counts in logged]
    assert history(tmp_path / "out", "tokens_per_second") == expected


@pytest.mark.parametrize("due", ["should_evaluate", "should_save", "should_log", None])
def test_step_that_evaluates_or_saves_logs(due):
    control = TrainerControl(**({due: True} if due else {}))
    LogBeforeSaving().on_step_end(None, None, control)
    assert control.should_log is (due is not None)
