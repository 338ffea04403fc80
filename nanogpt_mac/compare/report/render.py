"""A comparison's report in the terminal, in markdown for an issue, and as one HTML page (page.py)."""

from __future__ import annotations

from typing import Any

from nanogpt_mac.compare.report import evidence, measured
from nanogpt_mac.compare.report.sections import headline, problems, verdict
from nanogpt_mac.compare.report.show import markdown_page, show_page
from nanogpt_mac.compare.report.table import Section
from nanogpt_mac.compare.report.words import get, text

_IN_TERMINAL = ("variants", "times", "levers")


def sections(comparison: Any) -> list[Section]:
    """The whole report, in order. Never raises for a key that is missing or null."""
    return [
        part(comparison)
        for part in (
            measured.variants_section,
            evidence.problems_section,
            measured.times_section,
            measured.loss_section,
            measured.utilisation_section,
            measured.phases_section,
            measured.memory_section,
            measured.energy_section,
            measured.levers_section,
            evidence.parity_section,
            evidence.fallbacks_section,
            evidence.compile_section,
            evidence.published_section,
            evidence.environment_section,
        )
    ]


def html(comparison: Any) -> str:
    """One self-contained page that opens offline."""
    from nanogpt_mac.compare.report import page  # matplotlib and jinja2

    return page.comparison_page(comparison)


def markdown(comparison: Any) -> str:
    """report.md: the verdict and the variants in sight, everything long folded away."""
    heading = "Comparison: " + ", ".join(headline(comparison))
    return markdown_page(heading, verdict(comparison), sections(comparison), text(get(comparison, "version")))


def show(comparison: Any) -> None:
    """The verdict, what speaks against it, the variants side by side, rounds and levers, on standard output."""
    show_page(
        verdict(comparison),
        ", ".join(headline(comparison)),
        problems(comparison),
        [section for section in sections(comparison) if section.id in _IN_TERMINAL],
    )
