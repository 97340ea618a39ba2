"""The results of an evaluation as an HTML page.

Of a scored one: mean scores, histograms, best and worst samples. Of general prompts: the table, and all answers.
"""

import io
from collections.abc import Callable
from typing import Any

from jinja2 import DictLoader, Environment
from matplotlib.figure import Figure

from qlora.evaluation.general import COLUMNS, cells
from qlora.evaluation.metrics import METRICS

Clean = Callable[[str], str]
SORTED_BY = "rouge-l"
SHOWN = 5  # of the best samples, and of the worst
MODELS = {"base": "微调前 Before", "adapter": "微调后 After"}
COLORS = {"base": "#8a8f98", "adapter": "#2563eb"}

LAYOUT = """<!DOCTYPE html>
<html lang="zh-CN">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 16px/1.6 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; color: #1f2328;
         max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
  table { border-collapse: collapse; } td, th { padding: .3rem 1rem; border-bottom: 1px solid #d0d7de; }
  .means td { text-align: right; font-variant-numeric: tabular-nums; } th { text-align: left; }
  .settings { color: #59636e; font-size: .85rem; overflow-wrap: anywhere; }
  .sample { border: 1px solid #d0d7de; border-radius: .5rem; padding: .2rem 1rem; margin: 1rem 0; }
  dt { color: #59636e; font-size: .85rem; } dd { margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
  svg { max-width: 100%; height: auto; }
  .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
</style>
<h1>{{ title }}</h1>
<p class="settings">{% for name, value in settings.items() %}{{ name }} = {{ value }}{{ "" if loop.last else " · " }}
{%- endfor %}</p>
{% block results %}{% endblock %}
</html>
"""

SCORES = """{% extends "layout" %}
{% block results %}
<table class="means">
<tr><th>{{ count }} 个样本 samples</th>{% for name in metrics %}<th>{{ name | upper }}</th>{% endfor %}</tr>
{% for model, label in models.items() -%}
<tr><th>{{ label }}</th>{% for name in metrics %}<td>{{ "%.2f" | format(means[model][name]) }}</td>{% endfor %}</tr>
{% endfor -%}
</table>
<h2>分布 Score distributions</h2>
{{ histograms | safe }}
{% for heading, samples in sections.items() %}
<h2>{{ heading }}</h2>
{% for sample in samples %}
<div class="sample"><dl>
<dt>输入 Input</dt><dd>{{ sample.prompt }}</dd>
<dt>参考 Reference</dt><dd>{{ sample.reference | clean }}</dd>
{% for model, label in models.items() -%}
<dt>{{ label }} · {% for name in metrics %}{{ name | upper }} {{ "%.1f" | format(sample.scores[model][name]) }}
{{- "" if loop.last else " · " }}{% endfor %}</dt><dd>{{ (sample[model] | clean) or "（空 empty）" }}</dd>
{% endfor -%}
</dl></div>
{% endfor %}
{% endfor %}
{% endblock %}
"""

GENERAL = """{% extends "layout" %}
{% block results %}
<table class="means">
<tr><th>category</th>{% for heading in columns %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for category, row in table.items() -%}
<tr><th>{{ category }}</th>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</table>
{% for sample in predictions %}
<div class="sample"><dl>
<dt>{{ sample.category }} · ROUGE-L {{ "%.0f" | format(sample.measures.rouge_l) }}
{{- " · 变成训练任务 turned into the task" if sample.measures.turned }}</dt><dd>{{ sample.prompt }}</dd>
{% if sample.expected %}<dt>应含 Expected</dt><dd>{{ sample.expected }}</dd>{% endif %}
</dl><dl class="pair">
{% for model, label in models.items() -%}
<div><dt>{{ label }}{% if sample.expected %} {{ "✓" if sample.measures["right_" ~ model] else "✗" }}{% endif %}</dt>
<dd>{{ (sample[model] | clean) or "（空 empty）" }}</dd></div>
{% endfor -%}
</dl></div>
{% endfor %}
{% endblock %}
"""


def render_page(title: str, settings: dict, means: dict, predictions: list[dict], clean: Clean) -> str:
    """The text of the HTML page.

    Args:
        title: heading of the page.
        settings: of the evaluation, name -> value.
        means: model ("base", "adapter") -> metric -> mean in percent.
        predictions: dicts with `prompt`, `reference`, `base`, `adapter`, and `scores`, in the form of `means`.
        clean: formats a text that a model generated.
    """
    ranked = sorted(predictions, key=lambda row: row["scores"]["adapter"][SORTED_BY], reverse=True)
    sections = {
        f"最好的回答 Best answers after fine-tuning, by {SORTED_BY.upper()}": ranked[:SHOWN],
        "最差的回答 Worst answers": ranked[SHOWN:][: -SHOWN - 1 : -1],
    }
    return render(
        SCORES,
        clean,
        **{"title": title, "settings": settings, "means": means, "count": len(predictions), "sections": sections},
        **{"metrics": METRICS, "histograms": draw_histograms(predictions)},
    )


def render_general_page(title: str, settings: dict, table: dict, predictions: list[dict], clean: Clean) -> str:
    """The text of the HTML page of general prompts.

    Args:
        title: heading of the page.
        settings: of the evaluation, name -> value.
        table: as `summarize_categories` returns it.
        predictions: dicts with `category`, `prompt`, `base`, `adapter`, `measures`, and `expected` where there is one.
        clean: formats a text that a model generated.
    """
    texts = {category: cells(row) for category, row in table.items()}
    values = {"title": title, "settings": settings, "table": texts, "predictions": predictions, "columns": COLUMNS}
    return render(GENERAL, clean, **values)


def render(template: str, clean: Clean, **values: Any) -> str:
    """A template within the layout, with everything escaped."""
    environment = Environment(autoescape=True, loader=DictLoader({"layout": LAYOUT}))
    environment.filters["clean"] = clean
    return environment.from_string(template).render(models=MODELS, **values)


def draw_histograms(predictions: list[dict]) -> str:
    """A histogram of each metric with the scores of both models, as an SVG element."""
    figure = Figure(figsize=(9.6, 5.4), layout="tight")
    for axes, metric in zip(figure.subplots(2, 2).flat, METRICS, strict=True):
        values = {model: [row["scores"][model][metric] for row in predictions] for model in MODELS}
        highest = max(max(map(max, values.values())), 1)
        for model, scores in values.items():
            label = {"base": "before", "adapter": "after"}[model]
            axes.hist(scores, bins=30, range=(0, highest), color=COLORS[model], alpha=0.6, label=label)
        axes.set(title=metric.upper(), xlabel="percent", ylabel="samples")
        axes.legend()
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    return picture.getvalue()[picture.getvalue().index("<svg") :]
