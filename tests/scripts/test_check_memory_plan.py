"""scripts/check_memory_plan.py without a GPU: its cases, and the steps that it measures."""

import functools
import sys

import pytest
import torch
from conftest import ROOT, StandInRecorder, import_script, run_main

from qlora.loading import load_quantized_model
from qlora.training import memory_plan
from qlora.training.graphs import GraphedPasses


@pytest.fixture
def script(monkeypatch):
    module = import_script(ROOT / "scripts" / "check_memory_plan.py")
    monkeypatch.setattr(memory_plan, "gpu_has_kernels", lambda dtype: True)
    monkeypatch.setattr(module, "GraphedPasses", functools.partial(GraphedPasses, recorder=StandInRecorder))
    yield module
    del sys.modules[module.__name__]


def test_cases_have_every_kind_of_plan_and_number_of_tokens(script):
    plans = [plan for number in range(len(script.ADAPTERS)) for plan in script.plans(28, number)]
    assert {plan.max_tokens for plan in plans} == set(script.TOKENS)
    assert len({(plan.recompute_mlp, plan.recompute_attention, plan.offload) for plan in plans}) == 5
    kinds = {(plan.max_tokens, plan.recompute_mlp, plan.recompute_attention, plan.offload) for plan in plans}
    assert len(kinds) == 5 * len(script.TOKENS)


def test_table(script, golden_folder, monkeypatch, capsys):
    model = load_quantized_model(str(golden_folder), torch.float32)
    plans = script.plans
    monkeypatch.setattr(script, "load_quantized_model", lambda *args: model)
    monkeypatch.setattr(script, "ADAPTERS", ((2, 1), (3, 4)))
    monkeypatch.setattr(script, "TOKENS", (100, 200))
    monkeypatch.setattr(script, "MOST_ID", 400)
    monkeypatch.setattr(script, "plans", lambda *args: [plan for plan in plans(*args) if not plan.offload])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**30)
    linear = [module for module in model.modules() if "Linear4bit" in type(module).__name__]
    run_main(script, "--model_name_or_path", golden_folder)
    _, *lines = capsys.readouterr().out.splitlines()
    cases = [("2", "1", tokens) for tokens in ("100", "200", "100", "100")]
    cases += [("3", "4", tokens) for tokens in ("200", "100", "200", "200")]
    assert [tuple(line.split()[:3]) for line in lines] == cases
    assert linear == [module for module in model.modules() if "Linear4bit" in type(module).__name__]
