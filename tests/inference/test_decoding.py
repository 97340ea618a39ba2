"""qlora/inference/decoding.py: the tokens are those of transformers' `generate`; the state is changed in place."""

import contextlib

import pytest
import torch
from conftest import GOLDEN_CHECKPOINT, add_random_lora
from transformers import GenerationConfig

from chatglm import ChatGLMForConditionalGeneration, fast_layers
from chatglm.chat import OFFICIAL_SAMPLING
from qlora.arguments import LOWEST_TEMPERATURE
from qlora.inference.decoding import Decoder, Sampler, decode, make_sampler
from qlora.layers.replacement import replace_layers
from qlora.loading import load_quantized_model

PAD = 3


@pytest.fixture(scope="module")
def model() -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(GOLDEN_CHECKPOINT, dtype=torch.float32).eval()


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    return ids, (ids != PAD).long()


def test_greedy_tokens_are_those_of_the_official_code(model, cases):
    for case in cases["generate"]:
        if not case.get("with_adapter"):
            ids, mask = left_padded([case["prompt"]])
            pieces = decode(model, ids, mask, len(case["new_tokens"]), make_sampler(do_sample=False), sync_every=3)
            assert torch.cat(list(pieces), dim=1)[0].tolist() == case["new_tokens"]


def test_tokens_of_a_batch_are_those_of_generate(model, cases):
    ids, mask = left_padded([case["prompt"] for case in cases["generate"][:2]] + [[5, 6, 507, 508]])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, ids.shape[1] :]
    tokens = torch.cat(list(decode(model, ids, mask, 20, make_sampler(do_sample=False))), dim=1)
    assert torch.equal(tokens[:, : expected.shape[1]], expected)
    assert (tokens[:, expected.shape[1] :] == PAD).all()


@pytest.mark.parametrize("sync_every", [1, 2, 7, 50])
def test_tokens_do_not_depend_on_sync_every(model, cases, sync_every):
    ids, mask = left_padded([cases["generate"][0]["prompt"]])
    pieces = list(decode(model, ids, mask, 15, make_sampler(do_sample=False), sync_every=sync_every))
    assert torch.cat(pieces, dim=1)[0].tolist() == cases["generate"][0]["new_tokens"][:15]
    assert all(piece.shape[1] <= sync_every + 1 for piece in pieces)


def test_ended_answers_get_padding_and_decoding_stops_after_the_last(model):
    ids, mask = left_padded([[10, 11, 507, 508], [12, 507, 508]])
    eos, steps = model.config.eos_token_id, []

    def sampler(logits: torch.Tensor) -> torch.Tensor:
        steps.append(None)
        return torch.tensor([[eos if len(steps) >= 2 else 20], [eos if len(steps) >= 4 else 21]])

    tokens = torch.cat(list(decode(model, ids, mask, 40, sampler, sync_every=2)), dim=1)
    assert tokens[0, :4].tolist() == [20, eos, PAD, PAD]
    assert tokens[1, :4].tolist() == [21, 21, 21, eos]
    assert tokens.shape[1] < 8


def test_sampling_depends_on_the_seed(model):
    ids, mask = left_padded([[10, 11, 507, 508]])

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return torch.cat(list(decode(model, ids, mask, 30, make_sampler(True, top_p=0.99, temperature=2.0))), 1)[
            0
        ].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("setting", [{"top_p": 1e-6}, {"top_p": 1e-30}, {"temperature": LOWEST_TEMPERATURE}])
def test_sampling_at_the_lowest_settings_is_greedy(setting):
    logits = torch.tensor([[0.1, 2.0, 0.3], [3.0, 0.0, 0.0]])
    assert make_sampler(True, **setting)(logits)[:, 0].tolist() == [1, 0]
    assert make_sampler(True, **setting)(logits * 1e4)[:, 0].tolist() == [1, 0]
    assert make_sampler(False)(logits)[:, 0].tolist() == [1, 0]


def test_state_is_changed_in_place(model):
    # Each replay of a CUDA graph uses the same addresses.
    ids, mask = left_padded([[10, 11, 507, 508]])
    with torch.no_grad():
        decoder = Decoder(model, ids, mask, 8, make_sampler(do_sample=False))
        names = ("token", "position_ids", "new_tokens", "cache_position", "finished", "attention_mask")
        before = {name: getattr(decoder, name).data_ptr() for name in names}
        decoder.step()
        decoder.step()
    assert before == {name: getattr(decoder, name).data_ptr() for name in names}
    assert decoder.cache_position.item() == 3


@pytest.mark.parametrize("kernels", [False, True])
def test_logits_of_layers_for_inference_are_those_of_peft(golden_folder, cases, monkeypatch, kernels):
    # With kernels, too, in Triton's interpreter: norms, and attention of single tokens.
    if kernels:
        pytest.importorskip("triton")
        monkeypatch.setattr(fast_layers, "kernels_supported", lambda tensor: True)
    model = load_quantized_model(str(golden_folder), torch.float32)
    model = add_random_lora(model, ["query_key_value", "dense"]).eval()
    ids, mask = left_padded([case["prompt"] for case in cases["generate"][:2]] + [[5, 6, 507, 508]])

    def logits(adapter: bool) -> torch.Tensor:
        recorded = []
        sampler = make_sampler(do_sample=False)

        def recording_sampler(scores: torch.Tensor) -> torch.Tensor:
            recorded.append(scores)
            return sampler(scores)

        with contextlib.nullcontext() if adapter else model.disable_adapter():
            list(decode(model.get_base_model(), ids, mask, 3 if kernels else 8, recording_sampler))
        return torch.stack(recorded)

    expected = [logits(adapter) for adapter in (True, False)]
    replace_layers(model, for_training=False)
    for adapter, expected_logits in zip((True, False), expected, strict=True):
        torch.testing.assert_close(logits(adapter), expected_logits, atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 1e-2


# Sampling.


def kept_tokens(sampler: Sampler, logits: torch.Tensor, draws: int = 4000) -> torch.Tensor:
    """How often each token is drawn, [V]."""
    return torch.bincount(sampler(logits.expand(draws, -1))[:, 0], minlength=logits.shape[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 5, "top_p": 1.0, "temperature": 1.0},
        {"top_k": 0, "top_p": 0.9, "temperature": 1.0},
        {"top_k": 0, "top_p": 1.0, "temperature": 2.0},
        {"top_k": 40, "top_p": 0.5, "temperature": 0.5},
    ],
)
def test_frequencies_are_those_of_the_warpers_of_generate(tiny_model, settings):
    """A chi-square test; the expected distribution is made by the processors that `generate` itself would use."""
    config = GenerationConfig(**OFFICIAL_SAMPLING | settings)
    processors = tiny_model._get_logits_processor(config, input_ids_seq_length=1)
    torch.manual_seed(0)
    logits = torch.randn(1, 200) * 2
    expected = processors(torch.zeros(1, 1, dtype=torch.long), logits).softmax(dim=-1)[0]
    draws = 20_000
    found = kept_tokens(make_sampler(**OFFICIAL_SAMPLING | settings), logits, draws).double()
    possible = expected > 0
    assert not found[~possible].any()
    statistic = ((found - draws * expected) ** 2 / (draws * expected))[possible].sum().item()
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5  # five standard deviations
