"""scripts/merge_lora.py and quantize_checkpoint.py: a merged model has the outputs of base model and adapter."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from conftest import GOLDEN_ADAPTER, GOLDEN_CHECKPOINT, ROOT, import_script, largest_file
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from chatglm import ChatGLMForConditionalGeneration
from chatglm.chat import CHAT_TEMPLATE
from qlora.adapter import load_adapter
from qlora.atomic import atomic_folder
from qlora.checkpoint import check_checkpoint, weight_files
from qlora.export.four_bit_copy import write_quantized
from qlora.export.merging import WeightReader, merged_tensors
from qlora.loading import load_quantized_model, load_tokenizer

MODULES = ["query_key_value", "dense_h_to_4h"]
IDS = [25, 50, 228, 507, 508, 129, 52, 509]


@pytest.fixture(scope="module")
def scripts() -> dict:
    return {name: import_script(ROOT / "scripts" / f"{name}.py") for name in ("merge_lora", "quantize_checkpoint")}


@pytest.fixture
def run(scripts, monkeypatch):
    def main(name: str, **flags: object):
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        scripts[name].main()

    return main


def make_adapter(folder: Path, **options: object) -> str:
    """Writes a random LoRA adapter for the golden checkpoint; returns its path."""
    torch.manual_seed(0)
    config = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "target_modules": MODULES} | options
    model = ChatGLMForConditionalGeneration.from_pretrained(GOLDEN_CHECKPOINT, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**config))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(folder)
    return str(folder)


def in_memory(base: Path, adapter: str | Path, onto: str) -> ChatGLMForConditionalGeneration:
    """The merged model in fp32, not rounded to 16 bits."""
    config, tensor = merged_tensors(str(base), str(adapter), onto, torch.float32)
    model = ChatGLMForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensor(name, parameter.shape))
    return model.eval()


def logits(model: torch.nn.Module, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float()


# The weights.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"rank_pattern": {"dense_h_to_4h": 2}, "alpha_pattern": {"query_key_value": 8}},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
)
def test_merging_onto_the_original_weights_equals_peft(golden_folder, tmp_path, options):
    adapter = make_adapter(tmp_path / "adapter", **options)
    base = ChatGLMForConditionalGeneration.from_pretrained(golden_folder, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    merged = in_memory(golden_folder, adapter, "original").state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_merged_model_has_the_logits_of_the_official_code(golden_folder, cases, arrays):
    # The official code computed them in fp32, with the adapter not merged.
    model = in_memory(golden_folder, GOLDEN_ADAPTER, "original")
    merged = logits(model, cases["single"]["input_ids"])
    torch.testing.assert_close(merged, arrays["single_logits_with_adapter"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_weights_are_those_of_training(golden_folder, tmp_path, compute_dtype):
    adapter = make_adapter(tmp_path / "adapter")
    _, tensor = merged_tensors(str(golden_folder), adapter, "nf4", compute_dtype)
    trained = load_quantized_model(str(golden_folder), compute_dtype)
    deltas = load_adapter(load_quantized_model(str(golden_folder), compute_dtype), adapter)
    for name, layer in trained.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
            if name.rsplit(".", 1)[-1] in MODULES:
                delta = deltas.get_base_model().get_submodule(name).get_delta_weight("default")
                weight = weight.float() + delta.float()
            assert torch.equal(tensor(f"{name}.weight", (layer.out_features, layer.in_features)), weight), name


def test_merged_nf4_model_has_the_logits_of_base_and_adapter(golden_folder, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    tuned = load_adapter(load_quantized_model(str(golden_folder), torch.float32), adapter)
    merged = in_memory(golden_folder, adapter, "nf4")
    torch.testing.assert_close(logits(merged), logits(tuned), atol=1e-4, rtol=0)
    with tuned.disable_adapter():
        assert (logits(merged) - logits(tuned)).abs().max() > 1


def test_base_model_may_be_in_4_bits(golden_folder, tokenizer, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    write_quantized(load_quantized_model(str(golden_folder), torch.float32), tokenizer, str(tmp_path / "nf4"))
    expected = in_memory(golden_folder, adapter, "nf4").state_dict()
    for name, weight in in_memory(tmp_path / "nf4", adapter, "nf4").state_dict().items():
        assert torch.equal(weight, expected[name]), name
    with pytest.raises(ValueError, match=r"nf4 holds 4-bit weights.*--onto nf4"):
        merged_tensors(str(tmp_path / "nf4"), adapter, "original", torch.float32)


# The folder.


@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 11), ("bf16", 8)])
@pytest.mark.parametrize("onto", ["original", "nf4"])
def test_written_folder_is_official_and_has_the_same_logits(golden_folder, tmp_path, run, capsys, onto, dtype, bits):
    (golden_folder / "modeling_chatglm.py").write_text("raise SystemExit('official code')\n")
    adapter, output = make_adapter(tmp_path / "adapter"), tmp_path / "merged"
    flags = {"onto": onto, "dtype": dtype, "compute_dtype": "fp32"}
    run("merge_lora", model_name_or_path=golden_folder, adapter_path=adapter, output_dir=output, **flags)
    text = capsys.readouterr().out
    assert ("original 16-bit weights" in text) == (onto == "original") and ("4-bit weights" in text) == (onto == "nf4")

    assert check_checkpoint(str(output)).num_layers == 3
    assert load_tokenizer(str(output))("类型#裙") == load_tokenizer(str(golden_folder))("类型#裙")
    for name in ("modeling_chatglm.py", "tokenizer_config.json", "ice_text.model"):
        assert (output / name).read_bytes() == (golden_folder / name).read_bytes()
    assert (output / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    merged, official = (stored(folder) for folder in (output, golden_folder))
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in official.items()}
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {tensor.dtype for name, tensor in merged.items() if "inv_freq" not in name} == {torch_dtype}
    config = json.loads((output / "config.json").read_text())
    assert config["torch_dtype"] == str(torch_dtype)[6:]
    assert config["auto_map"] == json.loads((golden_folder / "config.json").read_text())["auto_map"]

    exact = in_memory(golden_folder, adapter, onto)
    expected = exact.state_dict()
    for name, tensor in merged.items():
        if "inv_freq" not in name:
            assert torch.equal(tensor, expected[name].to(torch_dtype)), name
    loaded = ChatGLMForConditionalGeneration.from_pretrained(output, dtype=torch.float32)
    # The rounding error of a weight is at most half a unit in its last place; the largest logit is about 2.5.
    torch.testing.assert_close(logits(loaded), logits(exact), atol=16 * 2.0**-bits, rtol=0)
    load_quantized_model(str(output), torch.float32)


def test_config_refers_to_the_official_code_only_if_it_is_copied(golden_folder, tokenizer, tmp_path, run):
    adapter, nf4, merged = make_adapter(tmp_path / "adapter"), tmp_path / "nf4", tmp_path / "merged"
    assert "auto_map" in json.loads((golden_folder / "config.json").read_text())
    write_quantized(load_quantized_model(str(golden_folder), torch.float32), tokenizer, nf4)
    for base in (golden_folder, nf4):
        output = merged / base.name
        run("merge_lora", model_name_or_path=base, adapter_path=adapter, output_dir=output, compute_dtype="fp32")
        assert "auto_map" not in json.loads((output / "config.json").read_text())
        assert not list(output.glob("*.py"))
        assert check_checkpoint(str(output)).num_layers == 3
        load_quantized_model(str(output), torch.float32)


@pytest.mark.parametrize("base", ["16 bits", "merged", "4 bits"])
def test_base_model_alone(golden_folder, tokenizer, tmp_path, run, capsys, base):
    folder, flags = golden_folder, {"adapter_path": "none"}
    if base == "merged":
        folder, adapter = tmp_path / "tuned", make_adapter(tmp_path / "adapter")
        run("merge_lora", model_name_or_path=golden_folder, adapter_path=adapter, output_dir=folder)
    if base == "4 bits":
        folder, flags = tmp_path / "nf4", flags | {"onto": "nf4"}
        write_quantized(load_quantized_model(str(golden_folder), torch.float32), tokenizer, folder)
    run("merge_lora", model_name_or_path=folder, output_dir=tmp_path / "copy", **flags)
    copy = stored(tmp_path / "copy")
    for name, weight in ChatGLMForConditionalGeneration(check_checkpoint(str(folder))).named_parameters():
        assert torch.equal(copy[name], WeightReader(str(folder))(name).half()) and copy[name].shape == weight.shape
    assert f"({folder}); wrote" in capsys.readouterr().out
    merged = [
        json.loads((path / "config.json").read_text()).get("merged_adapter") for path in (folder, tmp_path / "copy")
    ]
    assert merged[0] == merged[1] and (merged[0] is None) == (base != "merged")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in weight_files(folder) for n, t in torch.load(file, weights_only=True).items()}


def test_base_model_may_be_in_safetensors_files(golden_folder, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    expected = in_memory(golden_folder, adapter, "nf4").state_dict()
    model = ChatGLMForConditionalGeneration.from_pretrained(golden_folder)
    for file in (golden_folder / "pytorch_model.bin.index.json", *weight_files(golden_folder)):
        file.unlink()
    model.save_pretrained(golden_folder, max_shard_size="200KB")
    for name, weight in in_memory(golden_folder, adapter, "nf4").state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_merged_model_in_4_bits(golden_folder, tmp_path, run):
    adapter = make_adapter(tmp_path / "adapter")
    merged, quantized = tmp_path / "merged", tmp_path / "nf4"
    run("merge_lora", model_name_or_path=golden_folder, adapter_path=adapter, output_dir=merged, onto="original")
    run("quantize_checkpoint", model_name_or_path=merged, output_dir=quantized, compute_dtype="fp32")
    expected, loaded = (load_quantized_model(str(folder), torch.float32) for folder in (merged, quantized))
    assert torch.equal(logits(loaded), logits(expected))
    assert load_tokenizer(str(quantized))("类型#裙").input_ids == load_tokenizer(str(merged))("类型#裙").input_ids


# What is refused.


def test_adapter_is_refused_with_the_model_it_is_merged_into(golden_folder, tmp_path, run):
    adapter, merged, quantized = make_adapter(tmp_path / "adapter"), tmp_path / "merged", tmp_path / "nf4"
    run("merge_lora", model_name_or_path=golden_folder, adapter_path=adapter, output_dir=merged, onto="original")
    run("quantize_checkpoint", model_name_or_path=merged, output_dir=quantized)
    for folder in (merged, quantized):
        with pytest.raises(ValueError, match="is already merged into"):
            load_adapter(load_quantized_model(str(folder), torch.float32), adapter)
    other = make_adapter(tmp_path / "other", r=2)
    load_adapter(load_quantized_model(str(merged), torch.float32), other)


def test_folder_in_4_bits_is_not_quantized_again(golden_folder, tmp_path, run):
    run("quantize_checkpoint", model_name_or_path=golden_folder, output_dir=tmp_path / "nf4")
    with pytest.raises(SystemExit, match="is in 4 bits already"):
        run("quantize_checkpoint", model_name_or_path=tmp_path / "nf4", output_dir=tmp_path / "again")


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["final_layernorm"]},
        {"init_lora_weights": "pissa"},
    ],
)
def test_more_than_plain_lora_is_refused(golden_folder, tmp_path, options):
    adapter = make_adapter(tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=rf"adapter is more than plain LoRA .*{next(iter(options))}="):
        merged_tensors(str(golden_folder), adapter, "original", torch.float32)


def test_another_kind_of_adapter_is_refused(golden_folder, tmp_path):
    IA3Config(target_modules=MODULES, feedforward_modules=MODULES[1:]).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match=r"ia3 is of type .*IA3; this project uses LoRA only"):
        merged_tensors(str(golden_folder), str(tmp_path / "ia3"), "nf4", torch.float32)


@pytest.mark.parametrize("module", ["lm_head", "word_embeddings"])
def test_an_adapter_of_embedding_or_head_is_refused(golden_folder, tmp_path, module):
    adapter = make_adapter(tmp_path / "adapter", target_modules=["query_key_value", module])
    with pytest.raises(ValueError, match=rf"adapter in .* has a part in \S*{module}\."):
        merged_tensors(str(golden_folder), adapter, "original", torch.float32)


def test_an_adapter_of_another_model_is_refused(tiny_checkpoint, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")  # of a model with three layers, not two
    with pytest.raises(ValueError, match=r"adapter in .* does not fit the base model"):
        merged_tensors(str(tiny_checkpoint), adapter, "nf4", torch.float32)


def test_a_checkpoint_that_lacks_a_weight_is_refused(golden_folder, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    for file in weight_files(golden_folder):
        state = torch.load(file, weights_only=True)
        state.pop("transformer.layers.1.mlp.dense_h_to_4h.weight", None)
        torch.save(state, file)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.dense_h_to_4h\.weight is in none of its weight files"):
        in_memory(golden_folder, adapter, "original")


def spoil(folder: Path, name: str, value: float):
    """Sets one value of a weight, in bf16 files."""
    for file in weight_files(folder):
        state = {name: tensor.bfloat16() for name, tensor in torch.load(file, weights_only=True).items()}
        if name in state:
            state[name].view(-1)[0] = value
        torch.save(state, file)


@pytest.mark.parametrize(
    "name", ["transformer.layers.2.mlp.dense_4h_to_h.weight", "transformer.layers.1.attention.dense.bias"]
)
@pytest.mark.parametrize(("value", "dtype"), [(1e5, "fp16"), (float("nan"), "bf16")])
def test_weights_that_are_not_finite_are_not_written(golden_folder, tmp_path, run, monkeypatch, name, value, dtype):
    monkeypatch.setattr("qlora.loading.check_values", lambda *args: None)  # quantizing on a GPU can hide a NaN from it
    adapter = make_adapter(tmp_path / "adapter")
    spoil(golden_folder, name, value)
    merge = {"adapter_path": adapter, "onto": "original", "dtype": dtype}
    for script, flags in {"merge_lora": merge, "quantize_checkpoint": {"compute_dtype": dtype}}.items():
        with pytest.raises(SystemExit, match=rf"error: .*{name} is not finite .*in torch\.\w+{dtype[2:]}"):
            run(script, model_name_or_path=golden_folder, output_dir=tmp_path / "new", **flags)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dtype": "q4_0"}, "--dtype q4_0 is not of --format official: expected one of fp16, bf16, int8, int4"),
        ({"format": "chatglm.cpp", "dtype": "bf16"}, "--dtype bf16 .* chatglm.cpp: expected one of fp16, q8_0, q4_0"),
    ],
)
def test_a_type_of_another_format_is_refused(run, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run("merge_lora", output_dir=tmp_path / "new", **flags)


@pytest.mark.parametrize("flags", [{}, {"dtype": "int4"}, {"format": "chatglm.cpp", "dtype": "q4_0"}])
def test_a_full_disk_is_noticed_before_merging(run, golden_folder, tmp_path, monkeypatch, flags):
    adapter = make_adapter(tmp_path / "adapter")
    run("merge_lora", model_name_or_path=golden_folder, adapter_path=adapter, output_dir=tmp_path / "old", **flags)
    sizes = [file.stat().st_size for file in (tmp_path / "old").iterdir() if file.suffix == ".bin"]
    needed = 0

    def disk_usage(path: Path) -> SimpleNamespace:
        return SimpleNamespace(free=needed)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    monkeypatch.setattr("qlora.export.merging.delta_weight", lambda layer: pytest.fail("merges already"))
    needed = int(0.9 * sum(sizes))
    with pytest.raises(SystemExit, match=r"error: --output_dir needs 0\.\d MB, and the disk of \S+ has 0\.\d MB free"):
        run("merge_lora", model_name_or_path=golden_folder, adapter_path=adapter, output_dir=tmp_path / "new", **flags)
    assert not list(tmp_path.glob("new*"))
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    needed = sum(sizes)
    run("merge_lora", model_name_or_path=golden_folder, adapter_path=adapter, output_dir=tmp_path / "new", **flags)


@pytest.mark.parametrize("name", ["merge_lora", "quantize_checkpoint"])
def test_an_existing_folder_is_not_overwritten(run, golden_folder, tmp_path, name):
    adapter = {"adapter_path": make_adapter(tmp_path / "adapter")} if name == "merge_lora" else {}
    (tmp_path / "there").mkdir()
    with pytest.raises(SystemExit, match=r"error: --output_dir .*there exists already"):
        run(name, model_name_or_path=golden_folder, output_dir=tmp_path / "there", **adapter)
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("size", [200, 20_000, 60_000])
@pytest.mark.parametrize(
    ("name", "flags"),
    [("quantize_checkpoint", {}), ("merge_lora", {}), ("merge_lora", {"format": "chatglm.cpp", "dtype": "q4_0"})],
)
def test_full_disk_leaves_nothing(run, golden_folder, tmp_path, capsys, size, name, flags):
    adapter = {"adapter_path": make_adapter(tmp_path / "adapter")} if name == "merge_lora" else {}
    output = tmp_path / "new"
    with largest_file(size), pytest.raises(SystemExit) as raised:
        run(name, model_name_or_path=golden_folder, output_dir=output, **adapter, **flags)
    assert re.fullmatch(f"error: {output} cannot be written: [^\n]*name a folder on another disk.", str(raised.value))
    assert not list(tmp_path.glob("new*"))


def write_folder(path: str, *, appears: Path | None = None):
    """Writes a folder with one file; meanwhile the folder `appears` is created."""
    with atomic_folder(path) as folder:
        folder.mkdir()
        (folder / "all").write_text("ours")
        if appears:
            appears.mkdir()
            (appears / "all").write_text("another's")


@pytest.mark.parametrize("name", ["merged", "merged/", "merged//", "v1.0"])
def test_folder_appears_complete_or_not_at_all(tmp_path, name):
    target = f"{tmp_path}/{name}"
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as folder:
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())
    write_folder(target)
    assert [path.name for path in tmp_path.rglob("*")] == [name.strip("/"), "all"]


def test_folder_created_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "merged"
    with pytest.raises(OSError, match=r"merged\.partial"):
        write_folder(str(target), appears=target)
    assert (target / "all").read_text() == "another's"
    assert (tmp_path / "merged.partial" / "all").read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 2
