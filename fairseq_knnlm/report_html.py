"""The page of a report: tables and figures, legible in print and without colours."""

import base64
import math
from collections.abc import Iterator
from html import escape

from .html_page import definitions, page

_NONE = "\N{EN DASH}"


def render(results: dict, figures: dict) -> str:
    """The page.

    Args:
        results (dict): what ``report.write`` stores as JSON.
        figures (dict): SVG of each figure, bytes, by name.
    """
    split = results["split"]
    parts = [
        _header(results),
        _section("The number of neighbours", _neighbors(results, figures)),
        _section("Lambda and temperature", _lambda_and_temperature(results, figures)),
        _section("The size of the datastore", _size(results, figures)),
        _section("Frequent and rare words", _frequency(results, figures)),
        _section("Where neighbours help and where they hurt", _tokens(results, figures)),
    ]
    return page(f"Nearest neighbours on {split}", _STYLE, "\n".join(parts))


# -- sections --------------------------------------------------------------------------------------


def _header(results: dict) -> str:
    tuned, reported = results["tuned_on"], results.get("reported_on")
    told = f"settings tuned on {tuned['split']}, figures of {results['split']}"
    if results["split"] == tuned["split"]:
        told = (
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
        f"<p>Perplexity of the model's tokens, lower is better; {escape(told)}.</p>\n"
        + _table([*names, "95% interval"], rows, text=2)
        + _cache(tuned, reported)
        + f"\n{definitions(setting)}\n{stores}\n"
        f"<p>The same figure from <code>fairseq-eval-lm</code>:</p>\n"
        f"<pre>{escape(results['command'])}</pre>\n</header>"
    )


def _cache(tuned: dict, reported) -> str:
    """A table of what a continuous cache adds; nothing where none was tuned."""
    rows = [
        [
            result["split"], words, _number(result[f"{name}_perplexity"]),
            _percent(result[f"{name}_change{since}"]["value"]),
            _interval(result[f"{name}_change{since}"]),
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
    return "\n" + _table(names, rows, text=2) if rows else ""


def _headline_row(role: str, result: dict) -> list[str]:
    change = result["relative_change"]
    interval = f"{_interval(change)} ({change['units']:,} {change['unit']})"
    perplexities = (_number(result[name]) for name in ("base_perplexity", "knn_perplexity"))
    return [
        role, result["split"], f"{result['tokens']:,}", *perplexities,
        _percent(change["value"]), interval,
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
    yield _figures(
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
        f"perplexity on {results['split']}": lambda row: _number(row["perplexity"]),
        "targets found": lambda row: _percent(row["targets_found"], ""),
    }
    if results["split"] != results["tuned_on"]["split"]:
        name = f"perplexity on {results['tuned_on']['split']}"
        columns[name] = lambda row: _number(row["tuned_perplexity"])
    tables = results["tables"]
    yield _rows([{**a, **b} for a, b in zip(tables["k"], tables["found"])], columns)


def _lambda_and_temperature(results: dict, figures: dict) -> Iterator[str]:
    best, tuned_split = results["best"], results["tuned_on"]["split"]
    yield _figures(
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
    yield _figures(
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
        "share": lambda row: _percent(row["share"], "", 2),
        "neighbours taken": lambda row: f"{row['k']:,}" if row["k"] else "all known",
        "mean": lambda row: _number(row["mean_neighbors"], 1),
        "queries with fewer": lambda row: (
            _NONE if row["k"] is None else _percent(row["queries_with_fewer"], "", 2)
        ),
        "lambda": lambda row: f"{row['knn_lambda']:.3f}",
        "perplexity": lambda row: _number(row["perplexity"]),
    }
    yield _rows(results["tables"]["size"], columns)


def _frequency(results: dict, figures: dict) -> Iterator[str]:
    yield _figures(
        figures,
        frequency="Change of perplexity by how often the target is in the datastore. Bars: 95% "
        "interval of the paired bootstrap, where there are enough documents. Below each bucket its "
        "share of the tokens.",
    )
    columns = {
        "in the datastore": _frequency_label,
        "tokens": lambda row: f"{row['tokens']:,}",
        "share": lambda row: _percent(row["share"], ""),
        "without neighbours": lambda row: _number(row["base_perplexity"]),
        "with neighbours": lambda row: _number(row["knn_perplexity"]),
        "change": lambda row: _percent(row["relative_change"]),
        "95% interval": _interval,
        "nats gained": lambda row: _number(row["nats"], 0, "+"),
    }
    yield _rows(results["tables"]["frequency"], columns)


def _tokens(results: dict, figures: dict) -> Iterator[str]:
    (shares,) = results["tables"]["helped_or_hurt"]
    yield (
        f"<p>Neighbours raise the probability of <b>{_percent(shares['helped'], '')}</b> of "
        f"{shares['tokens']:,} targets, by {_number(shares['nats_gained'], 0)} nats in all, and "
        f"lower that of <b>{_percent(shares['hurt'], '')}</b>, by "
        f"{_number(-shares['nats_lost'], 0)} nats. They at least double it for "
        f"{_percent(shares['doubled'], '')} and at least halve it for "
        f"{_percent(shares['halved'], '')}. None is lowered by more than ln(1 - lambda).</p>"
    )
    yield _figures(
        figures,
        log_ratio="Above, tokens by ln(p_mixture / p_lm): left of 0 neighbours hurt, right of it "
        "they help. Below, the sum of these log-ratios in each bin: how much of the gain and of "
        "the loss comes from there. The last bins are open.",
    )
    columns = {
        "token": lambda row: row["token"],
        "nats": lambda row: _number(row["nats"], 1, "+"),
        "occurrences": lambda row: f"{row['occurrences']:,}",
        "factor": lambda row: f"\N{MULTIPLICATION SIGN}{_factor(row['mean_log_ratio'])}",
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
        yield _rows(rows, columns) if rows else "<p>None.</p>"
        yield "</div>"
    yield "</div>"


# -- pieces ----------------------------------------------------------------------------------------


def _section(title: str, content: Iterator[str]) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def _figures(figures: dict, **captions: str) -> str:
    shown = []
    for name, caption in captions.items():
        data = base64.b64encode(figures[name]).decode()
        caption = escape(caption)
        shown.append(
            f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="pair">{"".join(shown)}</div>'


def _rows(rows, columns: dict) -> str:
    return _table(columns, [[column(row) for column in columns.values()] for row in rows])


def _table(names, rows, text: int = 1) -> str:
    """A table whose first *text* columns are words, the others numbers."""

    def cells(kind, words):
        return "".join(
            f"<{kind}{' class=number' if number >= text else ''}>{escape(str(word))}</{kind}>"
            for number, word in enumerate(words)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", names)}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _frequency_label(row: dict) -> str:
    """A bucket of frequencies, in words."""
    if row["lowest"] == row["highest"]:
        return f"{row['lowest']:,}"
    return f"{row['lowest']:,}\N{EN DASH}{row['highest']:,}"


def _interval(change: dict) -> str:
    if change["low"] is None:
        return _NONE
    return f"{_percent(change['low'])} to {_percent(change['high'])}"


def _number(value: float, decimals: int = 2, sign: str = "") -> str:
    return f"{value:{sign},.{decimals}f}" if math.isfinite(value) else "infinite"


def _percent(value: float, sign: str = "+", decimals: int = 1) -> str:
    return f"{value:{sign}.{decimals}%}" if math.isfinite(value) else "infinite"


def _factor(log_ratio: float) -> str:
    return f"{math.exp(min(log_ratio, 700.0)):.2f}"


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
