"""qlora/training/curves.py, scripts/plot_loss.py, and the reporters of the Trainer."""

import json
import sys

import pytest
from conftest import ROOT, import_script
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qlora.training import training_args as training_json
from qlora.training.curves import draw_losses, loss_figure, read_history
from qlora.training.training_args import read_training_args

HISTORY = [
    {"step": 10, "loss": 3.0, "learning_rate": 1e-3},
    {"step": 20, "loss": 2.5, "learning_rate": 5e-4},
    {"step": 20, "eval_loss": 2.75},
    {"step": 30, "loss": 2.0, "learning_rate": 1e-4},
    {"step": 30, "eval_loss": 2.25},
    {"step": 30, "train_runtime": 7.0, "train_loss": 2.5},
]
PNG = b"\x89PNG\r\n"

REPORTERS = ("tensorboard", "wandb", "swanlab")  # named in the READMEs


def points_of(axes) -> dict[str, list[tuple[float, float]]]:
    """Label of each line -> its points."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_one_run_shows_losses_and_learning_rate():
    losses, rate = loss_figure({"run": HISTORY}).axes
    assert points_of(losses) == {
        "run, training": [(10, 3.0), (20, 2.5), (30, 2.0)],
        "run, evaluation": [(20, 2.75), (30, 2.25)],
    }
    assert points_of(rate) == {"learning rate": [(10, 1e-3), (20, 5e-4), (30, 1e-4)]}
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [*points_of(losses), *points_of(rate)]


def test_several_runs_have_different_colors_and_lines():
    (losses,) = loss_figure({"a": HISTORY, "b": HISTORY[:2]}).axes
    assert list(points_of(losses)) == ["a, training", "a, evaluation", "b, training"]
    assert len({(line.get_color(), line.get_linestyle()) for line in losses.get_lines()}) == 2


@pytest.mark.parametrize("history", [[], HISTORY[-1:], HISTORY[:1]])
def test_figure_of_a_run_with_few_log_entries(history, tmp_path):
    draw_losses({"run": history}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_script_draws_the_logs_of_runs(tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(picture)])
    import_script(ROOT / "scripts" / "plot_loss.py").main()
    assert picture.read_bytes().startswith(PNG) and "picture.png" in capsys.readouterr().out
    assert read_history(str(tmp_path / "a")) == HISTORY


def test_script_reports_a_folder_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .* is no output folder of a run"):
        import_script(ROOT / "scripts" / "plot_loss.py").main()


# Reporters.


def test_reporters_are_known_to_transformers():
    assert set(REPORTERS) <= INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize("name", REPORTERS)
def test_json_can_name_a_reporter(name, tmp_path, monkeypatch):
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"output_dir": "out", "report_to": name}))
    monkeypatch.setattr(training_json, "get_available_reporting_integrations", lambda: [name])
    assert read_training_args(str(path)).training_args.report_to == [name]
    monkeypatch.setattr(training_json, "get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match=f"report_to names {name}, which is not installed: run `pip install {name}`"):
        read_training_args(str(path))
