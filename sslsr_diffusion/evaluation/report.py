"""The self-contained HTML report: no scripts, no network, readable on a phone."""

from __future__ import annotations

from sslsr_diffusion.evaluation.charts import distribution
from sslsr_diffusion.evaluation.gallery import cards, pick
from sslsr_diffusion.evaluation.metrics import METRICS
from sslsr_diffusion.evaluation.scoring import Scores
from sslsr_diffusion.evaluation.statistics import LEAST
from sslsr_diffusion.evaluation.summary import Summary, arrow, interval, number
from sslsr_diffusion.images import printable

TEMPLATE = "report.html.j2"


def render_report(summary: Summary, scores: Scores, *, title: str = "Evaluation", examples: int = 2) -> str:
    """HTML with the summary table, a distribution plot per metric and the worst and best `examples` images of each."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sslsr_diffusion.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "interval": interval, "arrow": arrow}
    picks = pick(scores, examples)
    names = [printable(scene.name) for scene in scores.scenes]
    charts = {
        name: distribution({c: v.mean(axis=1) for c, v in by.items()}, names, summary.metrics[name].columns, METRICS[name].digits)
        for name, by in scores.values.items()
    }
    return environment.get_template(TEMPLATE).render(
        title=title,
        summary=summary,
        charts=charts,
        picks=picks,
        cards=cards(scores, picks),
        labels={n: m.label for n, m in METRICS.items()},
        least=LEAST,
    )
