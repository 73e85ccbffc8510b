"""The page of a report: tables and figures, legible in print and without colours."""

from collections.abc import Iterator
from html import escape
from typing import Optional

from ..html_page import definitions, page
from .page_parts import (
    NONE,
    factor,
    figures_with_captions,
    interval,
    number,
    percent,
    section,
    table,
    table_of,
)


def render(results: dict, figures: dict) -> str:
    """The page.

    Args:
        results (dict): what ``report.write`` stores as JSON.
        figures (dict): SVG of each figure, bytes, by name.

    Returns:
        str: HTML.
    """
    split = results["split"]
    parts = [
        _header(results),
        section("The number of neighbours", _neighbors(results, figures)),
        section("Lambda and temperature", _lambda_and_temperature(results, figures)),
        section("The size of the datastore", _size(results, figures)),
        section("Frequent and rare words", _frequency(results, figures)),
        section("Where neighbours help and where they hurt", _tokens(results, figures)),
    ]
    return page(f"Nearest neighbours on {split}", _STYLE, "\n".join(parts))


# -- sections --------------------------------------------------------------------------------------


def _header(results: dict) -> str:
    tuned, reported = results["tuned_on"], results.get("reported_on")
    source = f"settings tuned on {tuned['split']}, figures of {results['split']}"
    if results["split"] == tuned["split"]:
        source = (
            f"settings tuned on {tuned['split']}, and figures of the same split: better than they "
            "will be on another text (name one with --report-subset)"
        )
    rows = [_headline_row("tuned on", tuned)]
    if reported is not None and reported is not tuned:
        rows.append(_headline_row("reported on", reported))
    names = ("", "split", "tokens", "without neighbours", "with neighbours", "change")
    best, search = results["best"], results["search"]
    setting = {
        "k": f"{best['k']:,}",
        "lambda": f"{best['knn_lambda']:g}",
        "temperature": f"{best['temperature']:g}",
        "nprobe": search["nprobe"],
        "distances": search["distances"],
    }
    stores = "\n".join(map(definitions, map(_datastore_facts, results["datastores"])))
    return (
        f"<header>\n<h1>Nearest neighbours on {escape(results['split'])}</h1>\n"
        f"<p>Perplexity of the model's tokens, lower is better; {escape(source)}.</p>\n"
        + table([*names, "95% interval"], rows, text_columns=2)
        + _cache(tuned, reported)
        + f"\n{definitions(setting)}\n{stores}\n"
        f"<p>The same figure from <code>fairseq-eval-lm</code>:</p>\n"
        f"<pre>{escape(results['command'])}</pre>\n</header>"
    )


def _cache(tuned: dict, reported: Optional[dict]) -> str:
    """A table of what a continuous cache adds; nothing where none was tuned."""
    rows = [
        [
            result["split"], words, number(result[f"{name}_perplexity"]),
            percent(result[f"{name}_change{since}"]["value"]),
            interval(result[f"{name}_change{since}"]),
        ]
        for result in ([tuned] if reported in (None, tuned) else [tuned, reported])
        for name, since, words in (
            ("cache", "", "a cache alone, against the model alone"),
            ("knn_cache", "", "neighbours and cache, against the model alone"),
            ("knn_cache", "_from_knn", "neighbours and cache, against neighbours"),
        )
        if f"{name}_perplexity" in result
    ]  # fmt: skip
    names = ("split", "with a continuous cache", "perplexity", "change", "95% interval")
    return "\n" + table(names, rows, text_columns=2) if rows else ""


def _headline_row(role: str, result: dict) -> list[str]:
    change = result["relative_change"]
    bounds = f"{interval(change)} ({change['units']:,} {change['unit']})"
    perplexities = (number(result[name]) for name in ("base_perplexity", "knn_perplexity"))
    return [
        role, result["split"], f"{result['tokens']:,}", *perplexities,
        percent(change["value"]), bounds,
    ]  # fmt: skip


def _datastore_facts(datastore: dict) -> dict:
    return {
        "datastore": datastore["path"],
        "entries": f"{datastore['entries']:,}",
        "dimension": datastore["dimension"],
        "key": datastore["key"],
        "metric": datastore["metric"],
        "index": datastore["index"],
    }


def _neighbors(results: dict, figures: dict) -> Iterator[str]:
    yield figures_with_captions(
        figures,
        k="Perplexity against k (Khandelwal et al. 2020, Figure 4), and with the temperature of "
        "the best setting for every k. Lambda, and on the solid line the temperature, are the "
        f"best for each k on {results['tuned_on']['split']}.",
        found="Share of the targets that are the value of at least one of the k nearest "
        "neighbours: elsewhere p_knn is 0.",
    )
    columns = {
        "k": lambda row: f"{row['k']:,}",
        "temperature": lambda row: f"{row['temperature']:g}",
        "lambda": lambda row: f"{row['knn_lambda']:g}",
        f"perplexity on {results['split']}": lambda row: number(row["perplexity"]),
        "targets found": lambda row: percent(row["targets_found"], ""),
    }
    if results["split"] != results["tuned_on"]["split"]:
        name = f"perplexity on {results['tuned_on']['split']}"
        columns[name] = lambda row: number(row["tuned_perplexity"])
    tables = results["tables"]
    yield table_of([{**a, **b} for a, b in zip(tables["k"], tables["found"])], columns)


def _lambda_and_temperature(results: dict, figures: dict) -> Iterator[str]:
    best, tuned_split = results["best"], results["tuned_on"]["split"]
    yield figures_with_captions(
        figures,
        **{
            "lambda": f"Perplexity against lambda (Figure 5), at k = {best['k']:,} and T = "
            f"{best['temperature']:g}. The diamond is what {tuned_split} chose.",
            "temperature": "Perplexity against the temperature, k and lambda being the best for "
            f"each temperature on {tuned_split}.",
        },
    )


def _size(results: dict, figures: dict) -> Iterator[str]:
    same_k = results["tables"]["size"][0]["k"]
    yield figures_with_captions(
        figures,
        size="Perplexity against the size of the datastore (Figure 2): random parts of it, whose "
        "nearest neighbours are those of the whole that are in the part, so nothing is searched "
        "again. A part has as many known neighbours as were retrieved from it: about its share of "
        f"{results['search']['k']:,} (dashed), of which the solid line takes {same_k:,} for every "
        f"size. Temperature as chosen, lambda the best for each size on "
        f"{results['tuned_on']['split']}. What a datastore of that size gives with "
        f"{results['search']['k']:,} neighbours of its own is not known from here: build one of a "
        "part of the text to see it.",
    )
    columns = {
        "entries": lambda row: f"{row['entries']:,}",
        "share": lambda row: percent(row["share"], "", 2),
        "neighbours taken": lambda row: f"{row['k']:,}" if row["k"] else "all known",
        "mean": lambda row: number(row["mean_neighbors"], 1),
        "queries with fewer": lambda row: (
            NONE if row["k"] is None else percent(row["queries_with_fewer"], "", 2)
        ),
        "lambda": lambda row: f"{row['knn_lambda']:.3f}",
        "perplexity": lambda row: number(row["perplexity"]),
    }
    yield table_of(results["tables"]["size"], columns)


def _frequency(results: dict, figures: dict) -> Iterator[str]:
    yield figures_with_captions(
        figures,
        frequency="Change of perplexity by how often the target is in the datastore. Bars: 95% "
        "interval of the paired bootstrap, where there are enough documents. Below each bucket its "
        "share of the tokens.",
    )
    columns = {
        "in the datastore": _frequency_label,
        "tokens": lambda row: f"{row['tokens']:,}",
        "share": lambda row: percent(row["share"], ""),
        "without neighbours": lambda row: number(row["base_perplexity"]),
        "with neighbours": lambda row: number(row["knn_perplexity"]),
        "change": lambda row: percent(row["relative_change"]),
        "95% interval": interval,
        "nats gained": lambda row: number(row["nats"], 0, "+"),
    }
    yield table_of(results["tables"]["frequency"], columns)


def _tokens(results: dict, figures: dict) -> Iterator[str]:
    (shares,) = results["tables"]["helped_or_hurt"]
    yield (
        f"<p>Neighbours raise the probability of <b>{percent(shares['helped'], '')}</b> of "
        f"{shares['tokens']:,} targets, by {number(shares['nats_gained'], 0)} nats in all, and "
        f"lower that of <b>{percent(shares['hurt'], '')}</b>, by "
        f"{number(-shares['nats_lost'], 0)} nats. They at least double it for "
        f"{percent(shares['doubled'], '')} and at least halve it for "
        f"{percent(shares['halved'], '')}. None is lowered by more than ln(1 - lambda).</p>"
    )
    yield figures_with_captions(
        figures,
        log_ratio="Above, tokens by ln(p_mixture / p_lm): left of 0 neighbours hurt, right of it "
        "they help. Below, the sum of these log-ratios in each bin: how much of the gain and of "
        "the loss comes from there. The last bins are open.",
    )
    columns = {
        "token": lambda row: row["token"],
        "nats": lambda row: number(row["nats"], 1, "+"),
        "occurrences": lambda row: f"{row['occurrences']:,}",
        "factor": lambda row: f"\N{MULTIPLICATION SIGN}{factor(row['mean_log_ratio'])}",
        "in the datastore": lambda row: f"{row['training_count']:,}",
    }
    types = results["tables"]["types"]
    yield (
        "<p>All occurrences of a word together: the sum of its log-ratios, and the geometric mean "
        "of p_mixture / p_lm.</p>"
    )
    yield '<div class="pair">'
    for title, rows in (
        ("Words that gain most", [row for row in types if row["nats"] > 0]),
        ("Words that lose most", [row for row in types if row["nats"] < 0]),
    ):
        yield f"<div>\n<h3>{title}</h3>"
        yield table_of(rows, columns) if rows else "<p>None.</p>"
        yield "</div>"
    yield "</div>"


def _frequency_label(row: dict) -> str:
    """A bucket of frequencies, in words."""
    if row["lowest"] == row["highest"]:
        return f"{row['lowest']:,}"
    return f"{row['lowest']:,}\N{EN DASH}{row['highest']:,}"


_STYLE = """
body { max-width: 72rem; }
h2 { border-top: 1px solid #bbb; padding-top: .8rem; margin-top: 1.6rem; }
h3 { font-size: 1rem; margin: .6rem 0 .2rem; }
table { width: auto; min-width: 50%; }
th, td { padding-right: 1.4rem; vertical-align: bottom; }
td { white-space: nowrap; }
.number { text-align: right; }
.wide { overflow-x: auto; margin: .4rem 0 .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #bbb; margin: .4rem 0;
  padding: .5rem .7rem; font-size: .85rem; }
.pair { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.pair > * { flex: 1 1 26rem; min-width: 0; max-width: 36rem; }
figure { margin: .4rem 0; break-inside: avoid; }
figure img { width: 100%; height: auto; }
figure:only-child { flex-basis: 100%; max-width: none; display: flex; flex-wrap: wrap;
  align-items: center; gap: .4rem 2rem; }
figure:only-child > img { flex: 0 1 36rem; width: auto; min-width: 0; max-width: 100%; }
figure:only-child > figcaption { flex: 1 1 20rem; }
figcaption { font-size: .85rem; color: #454545; }
@media print {
  section { break-inside: avoid; }
  tr { break-inside: avoid; }
  .pair { gap: 0 1rem; }
  .pair > * { flex-basis: 45%; }
  figure:only-child > img { flex-basis: 55%; }
  figure:only-child > figcaption { flex-basis: 35%; }
  .pair > div { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding-right: 1em; }
}
"""
