"""CUDA graphs of training where something comes between: memory that runs out, skipped steps, evaluations, a break.

pytest -m gpu -n 0
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import add_random_lora, flags_of, history, random_checkpoint, random_samples, run_main, write_json

import train_qlora
from chatglm import ChatGLMConfig
from qlora.data.collator import PaddingFreeCollator
from qlora.layers.replacement import dropout_seed, replace_layers
from qlora.loading import load_quantized_model
from qlora.training.graphs import GraphedPasses
from qlora.training.memory_plan import MemoryPlan, apply_plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS = 4
OFFLOADED = ("--recompute_mlp", str(LAYERS), "--recompute_attention", str(LAYERS), "--offload", "true")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tiny_config, tmp_path_factory) -> Path:
    sizes = {"hidden_size": 1024, "inner_hidden_size": 4096, "num_layers": LAYERS, "num_attention_heads": 8}
    config = ChatGLMConfig(**tiny_config.to_dict() | sizes | {"initializer_range": 0.02})
    return random_checkpoint(tmp_path_factory.mktemp("gpu") / "checkpoint", config, tokenizer)


def make_model(checkpoint: Path, dtype: torch.dtype):
    """The model with a random adapter in layers for training."""
    model = add_random_lora(load_quantized_model(str(checkpoint), dtype), dropout=0.1).train()
    replace_layers(model, for_training=True)
    return model


def ask_for_too_much_memory(block: torch.nn.Module, where: str):
    """Makes rows of more than 256 tokens run out of memory in a pass through this block; the handle undoes it."""

    def ask(gradient: torch.Tensor | None = None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")

    def hook(module, inputs):
        if inputs[0].shape[1] > 256:
            ask() if where == "forward" else inputs[0].register_hook(ask)

    return block.register_forward_pre_hook(hook)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("offload", [False, True])
def test_training_goes_on_after_a_recording_ran_out_of_memory(checkpoint, offload, where):
    model = make_model(checkpoint, torch.bfloat16)
    apply_plan(model, MemoryPlan(1024, LAYERS, LAYERS, offload=offload))
    passes = GraphedPasses(model, PaddingFreeCollator(model.config), most_samples=4)
    samples = random_samples(model.config, (30, 100), (20, 200))

    def step() -> tuple:
        torch.manual_seed(1)
        model.zero_grad()
        loss = passes.forward_backward([[sample] for sample in samples], divisor=100)
        return loss, *(parameter.grad.clone() for parameter in passes.parameters)

    expected = step()
    passes.forget()
    before = torch.cuda.memory_allocated()
    handle = ask_for_too_much_memory(model.get_base_model().blocks[1], where)
    with pytest.raises(torch.OutOfMemoryError):
        passes.forward_backward([samples], divisor=100)
    handle.remove()
    passes.forget()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.memory_allocated() < before + 2**20  # what the GPU itself keeps of a stream may be new
    assert all(map(torch.equal, step(), expected))


def test_steps_that_loss_scaling_skips_are_those_without_graphs(checkpoint):
    model = make_model(checkpoint, torch.float16)
    collate = PaddingFreeCollator(model.config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in parameters]
    rows = [random_samples(model.config, (30, 100), (20, 30)) for _ in range(12)]
    passes = GraphedPasses(model, collate, most_samples=2)
    found = []
    for graphed in (True, False):
        torch.manual_seed(1)
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)
        optimizer, scaler = torch.optim.SGD(parameters, lr=1e-2), torch.amp.GradScaler(init_scale=1.5 * 2.0**29)
        scales = []
        for row in rows:
            if graphed:
                passes.forward_backward([row], 100, scaler.scale(torch.ones((), device="cuda")))
            else:
                dropout_seed(model).random_(2**30)
                inputs = {name: value.to("cuda") for name, value in collate(row).items()}
                scaler.scale(model(**inputs, num_items_in_batch=100).loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        found.append(
            (scales, [parameter.detach() - value for parameter, value in zip(parameters, start, strict=True)])
        )
    (scales, changes), (plain_scales, plain_changes) = found
    assert scales == plain_scales and 1 < len(set(scales)) < len(rows)  # some steps were skipped, and some were not
    for change, plain in zip(changes, plain_changes, strict=True):
        assert (change - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("flags", [(), OFFLOADED, ("--compute_dtype", "fp16")], ids=["kept", "offloaded", "fp16"])
def test_run_has_the_same_bits_after_a_break_and_without_evaluations(
    checkpoint, train_file, dev_file, tmp_path, flags
):
    def run(name: str, *more: str, evaluate: bool = True) -> Path:
        values = {"max_steps": 8, "save_steps": 4, "eval_steps": 2}
        path, rows = write_json(tmp_path / f"{name}.json", tmp_path / name, **values), dev_file if evaluate else "none"
        run_main(train_qlora, *flags_of(path, checkpoint, train_file, rows, "--max_tokens", "600", *flags, *more))
        return tmp_path / name

    unbroken = run("unbroken")
    shutil.copytree(unbroken / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    runs = [run("resumed", "--resume_from_checkpoint", "last"), run("not_evaluated", evaluate=False)]
    assert len(history(unbroken, "eval_loss")) == 4
    for other in runs:
        assert history(other, "loss") == history(unbroken, "loss")
        assert history(other, "grad_norm") == history(unbroken, "grad_norm")
        name = "adapter_model.safetensors"
        assert (other / name).read_bytes() == (unbroken / name).read_bytes()
    assert history(runs[0], "eval_loss") == history(unbroken, "eval_loss")
