"""The page of a report: what its template shows, legible in print and without colours."""

import base64
from typing import Optional

from ..html_page import render_page
from ..probability.bootstrap import BLOCK_TOKENS, MIN_UNITS
from .look import for_page
from .text_tables import TextTable, units


def render(results: dict, tables: dict[str, TextTable], figures: dict) -> str:
    """The page.

    Args:
        results (dict): what ``report.write`` stores as JSON.
        tables (dict): from ``text_tables``.
        figures (dict): SVG of each figure, bytes, by name.

    Returns:
        str: HTML.
    """
    (shares,) = results["tables"]["helped_or_hurt"]
    return render_page(
        "reporting/templates/report.html.j2",
        results=results,
        split=results["split"],
        tuned_split=results["tuned_on"]["split"],
        best=results["best"],
        texts=tables,
        figures={name: _as_data(svg) for name, svg in figures.items()},
        unit=_unit(results),
        of_tokens=_of_tokens(results),
        interval_note=_interval_note(results),
        settings=_settings(results),
        facts=_facts(results),
        shares=shares,
        words={row["words"]: row for row in results["tables"]["unknown"]},
        min_units=MIN_UNITS,
        same_k=results["tables"]["size"][0]["k"],
    )


def _as_data(svg: bytes) -> str:
    """An image as a URI that needs no network."""
    return f"data:image/svg+xml;base64,{base64.b64encode(for_page(svg)).decode()}"


def _unit(results: dict) -> str:
    """What perplexities are of."""
    tuned = results["tuned_on"]
    return "tokens" if tuned["counted"] == tuned["tokens"] else "words"


def _of_tokens(results: dict) -> Optional[dict]:
    """The perplexities of the headline over the tokens that words are made of, and bits per byte.

    Returns:
        dict: None where perplexities are of tokens.
    """
    if _unit(results) == "tokens":
        return None
    measured = results.get("reported_on", results["tuned_on"])
    share = measured["counted"] / measured["tokens"]
    return {
        "tokens": measured["tokens"],
        "words": measured["counted"],
        "base": measured["base_perplexity"] ** share,
        "knn": measured["knn_perplexity"] ** share,
        "bytes": measured["bytes"],
        "bits_per_byte": measured.get("base_bits_per_byte"),
        "knn_bits_per_byte": measured.get("knn_bits_per_byte"),
    }


def _interval_note(results: dict) -> str:
    """What the intervals of the headline were drawn from, or why there is none."""
    change = results.get("reported_on", results["tuned_on"])["relative_change"]
    drawn_from = units(change)
    if change["unit"] == "blocks":
        drawn_from += f" of {BLOCK_TOKENS:,} {_unit(results)}"
    if change["low"] is not None:
        return f"Intervals are of the paired bootstrap over the {drawn_from} of {results['split']}."
    return (
        f"No interval is shown: {results['split']} has {drawn_from}, and fewer than {MIN_UNITS} "
        "say nothing."
    )


def _settings(results: dict) -> dict:
    """What was chosen, by name, for each method."""
    best, search = results["best"], results["search"]
    chosen = {
        "neighbours": {
            "k": f"{best['k']:,}",
            "lambda": f"{best['knn_lambda']:.4g}",
            "temperature": f"{best['temperature']:.4g}",
            "nprobe": search["nprobe"],
            "distances": search["distances"],
        }
    }
    cache = results.get("best_knn_cache")
    if cache:
        chosen["neighbours and a cache"] = {
            "cache size": f"{cache['cache_size']:,}",
            "theta": f"{cache['cache_theta']:.4g}",
            "weight of the cache": f"{cache['cache_lambda']:.4g}",
            "lambda": f"{cache['knn_lambda']:.4g}",
        }
    return chosen


def _facts(results: dict) -> dict:
    """What was run, by name."""
    stores = results["datastores"]
    names = [f"Datastore {place}" for place in range(1, len(stores) + 1)]
    facts = {
        "Model": results["model"],
        "Context": results["context"],
        **dict(zip(names if len(stores) > 1 else ["Datastore"], stores)),
    }
    return {
        **{title: _in_words(values) for title, values in facts.items()},
        "Versions": results["versions"],
    }


def _in_words(values: dict) -> dict:
    return {
        name.replace("_", " "): f"{value:,}" if type(value) is int else str(value)
        for name, value in values.items()
    }
