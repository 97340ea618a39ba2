"""qlora/checkpoint.py: damaged, incomplete and other folders are refused.

Also qlora/export/official_folder.py: a folder that it writes in the official format.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN_ADAPTER, GOLDEN_CHECKPOINT, HOSTILE_TIMES, copy_tokenizer, hostile_random

from chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from qlora.checkpoint import check_checkpoint, is_finite, stored_shapes
from qlora.export.four_bit_copy import write_quantized
from qlora.export.official_folder import write_checkpoint
from qlora.loading import load_quantized_model, load_tokenizer

INDEX = "pytorch_model.bin.index.json"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:5e974d9a\nsize 1879731432\n"


def edit_json(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight_map(folder: Path, name: object):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"lm_head.weight": name})


def truncate(path: Path, keep: float = 0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.fixture
def safetensors_folder(golden_folder: Path) -> Path:
    """The golden weights in one .safetensors file."""
    ChatGLMForConditionalGeneration.from_pretrained(golden_folder).save_pretrained(golden_folder)
    for name in (INDEX, *SHARDS):
        (golden_folder / name).unlink()
    return golden_folder


# Complete folders.


def test_complete_folder_passes(golden_folder):
    config = check_checkpoint(str(golden_folder))
    assert isinstance(config, ChatGLMConfig)
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (3, 64, 512)


def test_safetensors_folder_passes(safetensors_folder):
    assert check_checkpoint(str(safetensors_folder)).num_layers == 3


def test_sharded_safetensors_folder_passes(golden_folder):
    model = ChatGLMForConditionalGeneration.from_pretrained(golden_folder)
    for name in (INDEX, *SHARDS):
        (golden_folder / name).unlink()
    model.save_pretrained(golden_folder, max_shard_size="200KB")
    assert (golden_folder / "model.safetensors.index.json").is_file()
    check_checkpoint(str(golden_folder))
    next(golden_folder.glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-"):
        check_checkpoint(str(golden_folder))


# Folders that are refused.


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere\. Download"):
        check_checkpoint(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("path", "meant"), [("chatglm-6b", "chatglm-6b"), ("ChatGLM3-6B/", "chatglm3-6b")])
def test_model_without_its_organization_is_recognized(path, meant):
    with pytest.raises(FileNotFoundError) as raised:
        check_checkpoint(path)
    assert str(raised.value) == f"there is no folder {path}. Did you mean THUDM/{meant}?"


@pytest.mark.parametrize("name", ["config.json", "ice_text.model", "tokenizer_config.json", *SHARDS])
def test_missing_file(golden_folder, name):
    (golden_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        check_checkpoint(str(golden_folder))


def test_no_weights_at_all(golden_folder):
    for name in (INDEX, *SHARDS):
        (golden_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("name", ["config.json", "ice_text.model", INDEX, *SHARDS])
def test_git_lfs_pointer(golden_folder, name):
    (golden_folder / name).write_bytes(LFS_POINTER)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
@pytest.mark.parametrize("name", SHARDS)
def test_truncated_bin(golden_folder, name, keep):
    truncate(golden_folder / name, keep)
    with pytest.raises(ValueError, match=f"{name} is damaged or incomplete"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.99])
def test_truncated_safetensors(safetensors_folder, keep):
    truncate(safetensors_folder / "model.safetensors", keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        check_checkpoint(str(safetensors_folder))


@pytest.mark.parametrize(
    "header", [b"{}", b"[]", b"{", b'{"a": {}}', b'{"a": {"data_offsets": []}}', b'{"a": {"data_offsets": [0, "1"]}}']
)
def test_broken_safetensors_header(safetensors_folder, header):
    (safetensors_folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or incomplete"):
        check_checkpoint(str(safetensors_folder))


def test_flipped_bits_raise_no_other_exception(golden_folder):
    path, draw, refused = golden_folder / SHARDS[1], hostile_random("bits"), 0
    content = path.read_bytes()
    for _ in range(100 * HOSTILE_TIMES):
        damaged = bytearray(content)
        for position in draw.sample(
            range(len(content) - 2000, len(content)), 3
        ):  # where the directory of the zip archive is
            damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            check_checkpoint(str(golden_folder))
        except ValueError as error:
            assert f"{path} is damaged or incomplete" in str(error) or f"{path} holds more than" in str(error)
            refused += 1
    assert refused > 50 * HOSTILE_TIMES


JUNK = (None, True, -1, 0, 7, 1e300, "", "../x", "裙" * 99, [], [1], {}, {"a": None})


def flip_bits(draw: random.Random, content: bytes) -> bytes:
    """A few bits, half of the time near an end, where headers are."""
    near = draw.choice([len(content), 200])
    damaged = bytearray(content)
    for _ in range(draw.randint(1, 8) if content else 0):
        position = draw.randrange(min(near, len(content)))
        damaged[draw.choice([position, -1 - position])] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def fill_with_zeros(draw: random.Random, content: bytes) -> bytes:
    start, end = sorted(draw.choices(range(len(content) + 1), k=2))
    return content[:start] + bytes(end - start) + content[end:]


def edit_values(draw: random.Random, content: bytes) -> bytes:
    """Other values in a JSON object, or in an object inside it; fewer or more of them."""
    try:
        outer = json.loads(content)
        inner = draw.choice([outer, *(value for value in outer.values() if isinstance(value, dict) and value)])
        for name in draw.sample(sorted(inner), min(len(inner), draw.randint(1, 3))):
            if draw.random() < 0.3:
                del inner[name]
            else:
                inner[name] = draw.choice(JUNK)
        return json.dumps(outer).encode()
    except (ValueError, AttributeError, IndexError):  # no JSON object: another one
        return json.dumps(draw.choice(JUNK)).encode()


DAMAGES = (
    flip_bits,
    fill_with_zeros,
    edit_values,
    lambda draw, content: content[: draw.randrange(len(content) + 1)],
    lambda draw, content: content + draw.randbytes(draw.randint(1, 100)),
    lambda draw, content: draw.choice([b"", LFS_POINTER, b"<html>", b"[" * 100_000, GOLDEN_ADAPTER.name.encode()]),
)


def damage_folder(draw: random.Random, folder: Path):
    """Damages, deletes or replaces one or two files of a folder."""
    contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for path in draw.sample(list(contents), draw.randint(1, 2)):
        kind = draw.random()
        if kind < 0.8:
            path.write_bytes(draw.choice(DAMAGES)(draw, contents[path]))
        elif kind < 0.9:
            path.write_bytes(draw.choice(list(contents.values())))
        else:
            path.unlink()
            if draw.random() < 0.5:
                path.mkdir()


def test_random_damage_raises_no_other_exception(golden_folder, tmp_path):
    draw, refused = hostile_random("folders"), 0
    for number in range(40 * HOSTILE_TIMES):
        folder = shutil.copytree(golden_folder, tmp_path / "damaged")
        damage_folder(draw, folder)
        try:
            check_checkpoint(str(folder))
            load_tokenizer(str(folder))
        except (ValueError, OSError) as error:
            message = str(error)
            assert str(folder) in message and len(message.splitlines()) == 1 and len(message) < 600, (number, message)
            refused += 1
        except Exception as error:
            raise AssertionError(f"folder {number}") from error
        shutil.rmtree(folder)
    assert refused > 20 * HOSTILE_TIMES


def test_mixture_with_chatglm2_is_refused(golden_folder):
    edit_json(golden_folder / "config.json", padded_vocab_size=65024, multi_query_attention=True)
    with pytest.raises(ValueError, match="ChatGLM2"):
        check_checkpoint(str(golden_folder))


def test_quantized_checkpoint_is_refused(golden_folder):
    edit_json(golden_folder / "config.json", quantization_bit=4)
    with pytest.raises(ValueError, match="quantization_bit=4"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("with_base", [True, False])
def test_folder_with_an_adapter_is_refused(golden_folder, tmp_path, with_base):
    folder = shutil.copytree(GOLDEN_ADAPTER, golden_folder if with_base else tmp_path / "adapter", dirs_exist_ok=True)
    advice = "move adapter_config.json and adapter_model.* into another one" if with_base else "name that one"
    with pytest.raises(ValueError, match=re.escape(f"{folder} holds an adapter")) as raised:
        check_checkpoint(str(folder))
    assert str(raised.value).endswith(f"a folder of its own: {advice}.")


@pytest.mark.parametrize("model_type", ["llama", "", None])
def test_other_model_type_is_refused(golden_folder, model_type):
    edit_json(golden_folder / "config.json", model_type=model_type)
    with pytest.raises(ValueError, match=f"a model of type {model_type!r}, expected 'chatglm'"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\ufeff{}"])
def test_broken_config_is_refused(golden_folder, content):
    (golden_folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"golden"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("name", ["../x.bin", "/etc/passwd", "sub/x.bin", 7, None, ["x.bin"]])
def test_index_that_names_files_of_other_folders_is_refused(golden_folder, name):
    edit_weight_map(golden_folder, name)
    with pytest.raises(ValueError, match=r"index\.json"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("name", ["..", "", ".", "other.bin"])
def test_index_that_names_a_missing_file_is_refused(golden_folder, name):
    edit_weight_map(golden_folder, name)
    with pytest.raises((FileNotFoundError, ValueError), match=r"missing|index"):
        check_checkpoint(str(golden_folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "null"])
def test_broken_index_is_refused(golden_folder, content):
    (golden_folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        check_checkpoint(str(golden_folder))


def test_index_without_metadata_is_refused(golden_folder):
    index = json.loads((golden_folder / INDEX).read_text())
    (golden_folder / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    with pytest.raises(ValueError, match=r'index\.json has no object "metadata"'):
        check_checkpoint(str(golden_folder))


# The configuration, compared with the files.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_layers": "3"}, "Field 'num_layers' expected int, got str"),
        ({"num_layers": 3.0}, "Field 'num_layers' expected int, got float"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType"),
        ({"layernorm_epsilon": "1e-5"}, "Field 'layernorm_epsilon' expected float, got str"),
        ({"torch_dtype": "fp17"}, "fp17"),
        ({"auto_map": 7}, "int"),
        ({"num_layers": -1}, "num_layers is -1, expected 1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected 1 or more"),
        ({"num_attention_heads": 5}, "hidden_size is 64, expected a multiple of 4 x 5"),
        ({"layernorm_epsilon": 0.0}, "layernorm_epsilon is 0.0, expected a positive number"),
        ({"layernorm_epsilon": float("nan")}, "layernorm_epsilon is nan, expected a positive number"),
        ({"gmask_token_id": 512}, "gmask_token_id is 512, expected a token id below vocab_size, 512"),
        ({"bos_token_id": None}, "bos_token_id is None, expected a token id"),
    ],
)
def test_value_of_the_configuration_that_no_model_has_is_refused(golden_folder, change, reason):
    edit_json(golden_folder / "config.json", **change)
    with pytest.raises(ValueError, match=rf"golden/config\.json: .*{re.escape(reason)}") as raised:
        check_checkpoint(str(golden_folder))
    assert len(str(raised.value).splitlines()) == 1


@pytest.fixture
def nf4_folder(golden_folder, tokenizer, tmp_path) -> Path:
    """The golden weights in 4 bits."""
    write_quantized(load_quantized_model(str(golden_folder), torch.float32), tokenizer, tmp_path / "nf4")
    return tmp_path / "nf4"


@pytest.mark.parametrize("kind", ["golden_folder", "safetensors_folder", "nf4_folder"])
def test_configuration_that_does_not_fit_the_weights_is_refused(request, kind):
    folder = request.getfixturevalue(kind)
    check_checkpoint(str(folder))
    config = json.loads((folder / "config.json").read_text())
    for change, reason in [
        ({"num_layers": 2}, "num_layers 2, and the weight files hold 3 layers"),
        ({"num_layers": 10**9}, "num_layers 1000000000, and the weight files hold 3 layers"),
        ({"hidden_size": 128}, "has shape .*expected"),
        ({"inner_hidden_size": 128}, "mlp.* has shape .*expected"),
        ({"vocab_size": 1024}, r"word_embeddings\.weight has shape \(512, 64\), expected \(1024, 64\)"),
    ]:
        edit_json(folder / "config.json", **config | change)
        with pytest.raises(ValueError, match=rf"{folder.name}: .*{reason}") as raised:
            check_checkpoint(str(folder))
        assert len(str(raised.value).splitlines()) == 1


def test_4_bit_configuration_with_16_bit_weights_is_refused(golden_folder, nf4_folder):
    values = json.loads((nf4_folder / "config.json").read_text())
    edit_json(golden_folder / "config.json", quantization_config=values["quantization_config"])
    with pytest.raises(ValueError, match=r"attention\.dense\.weight\.absmax is in none of its weight files"):
        check_checkpoint(str(golden_folder))
    del values["quantization_config"]
    (nf4_folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"weight\.absmax is not a weight of this model"):
        check_checkpoint(str(nf4_folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("lm_head.weight"), None),  # it is the embedding
        (lambda state: state.pop("transformer.final_layernorm.bias"), "final_layernorm.bias is in none of its weight"),
        (lambda state: state.update(extra=torch.ones(2)), "extra is not a weight of this model"),
        (lambda state: state.update(extra=7), "is damaged or incomplete: it holds no dictionary of tensors"),
        (
            lambda state: state.update({"lm_head.weight": torch.ones(2)}),
            "lm_head.weight has shape (2,), expected (512",
        ),
    ],
)
def test_names_and_shapes_in_the_files_are_compared(golden_folder, change, reason):
    path = golden_folder / SHARDS[1]
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    if reason is None:
        check_checkpoint(str(golden_folder))
        return
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_checkpoint(str(golden_folder))


def test_shapes_are_read_without_the_values(tmp_path):
    # A sparse file of 8 GiB, which would take seconds to read.
    path = tmp_path / "pytorch_model.bin"
    with torch.serialization.skip_data():
        torch.save({"weight": torch.empty(2**16, 2**16, dtype=torch.float16, device="meta")}, path)
    assert stored_shapes(path) == {"weight": (2**16, 2**16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_finite(dtype):
    values = torch.zeros(3, 5, dtype=dtype)
    assert is_finite(values) and is_finite(values[:0])
    for value in (float("nan"), float("inf"), -float("inf")):
        values[1, 2] = value
        assert not is_finite(values)


# Writing a checkpoint.


@pytest.fixture(scope="module")
def golden_model() -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(GOLDEN_CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module", params=["200KB", "5GB"])
def written(request, golden_model, tmp_path_factory) -> Path:
    """A folder with the golden model as `write_checkpoint` writes it, in shards or in one file."""
    folder = tmp_path_factory.mktemp("written") / "new"
    folder.mkdir()
    (folder / "modeling_chatglm.py").touch()  # the official code, which is not run
    state = golden_model.state_dict()
    write_checkpoint(str(folder), golden_model.config, lambda name, shape: state[name], shard_size=request.param)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all .bin files of a folder."""
    state = {}
    for path in sorted(folder.glob("*.bin")):
        part = torch.load(path, weights_only=True)
        assert not state.keys() & part.keys()
        state |= part
    return state


def test_written_entries_are_those_of_the_official_files(written):
    official, found = stored(GOLDEN_CHECKPOINT), stored(written)
    assert found.keys() == official.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    for name, tensor in official.items():
        assert torch.equal(found[name], tensor), name


def test_written_index_is_right(written):
    if not (written / INDEX).is_file():
        assert [path.name for path in written.glob("*.bin")] == ["pytorch_model.bin"]
        return
    index = json.loads((written / INDEX).read_text())
    for name, filename in index["weight_map"].items():
        assert name in torch.load(written / filename, weights_only=True)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored(written).values())
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in written.glob("*.bin"))
    count = len(set(index["weight_map"].values()))
    assert f"pytorch_model-00001-of-{count:05}.bin" in index["weight_map"].values() and count > 2


def test_written_config_has_the_official_keys(written):
    found, official = (json.loads((folder / "config.json").read_text()) for folder in (written, GOLDEN_CHECKPOINT))
    ignored = {"transformers_version", "prefix_projection", "quantization_embeddings"}
    assert {name: found.get(name) for name in official.keys() - ignored} == {
        name: value for name, value in official.items() if name not in ignored
    }


def test_written_checkpoint_loads_equal(written, golden_model, tokenizer):
    copy_tokenizer(tokenizer, written)
    check_checkpoint(str(written))
    loaded = ChatGLMForConditionalGeneration.from_pretrained(written, dtype=torch.float32)
    expected = golden_model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
