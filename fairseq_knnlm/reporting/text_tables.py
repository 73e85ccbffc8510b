"""The tables that people read, on the page and in papers: numbers of the report in words."""

from collections.abc import Iterable
from typing import Callable, NamedTuple, Optional

from ..html_page import NONE, factor, number, percent
from ..tuning.choice import BESIDES, METHODS, change_of

_METHODS = {"base": "the model alone", **METHODS}


class TextTable(NamedTuple):
    """A table in words.

    caption (str): what it shows.
    columns (list of str): their names.
    rows (list of list of str): what stands in the columns.
    text_columns (int): how many columns at the left are words; the others are numbers.
    """

    caption: str
    columns: list
    rows: list
    text_columns: int


def text_tables(results: dict) -> dict[str, TextTable]:
    """All of them, by name.

    Args:
        results (dict): what ``report.write`` stores as JSON.

    Returns:
        dict: ``headline``, ``k``, ``size``, ``frequency``, ``gained`` and ``lost``; with a gate
        ``gate_trust``, ``gate_whom`` and, where it can skip searches, ``gate_skip``.
    """
    types = results["tables"]["types"]
    return {
        "headline": _headline(results),
        "k": _neighbors(results),
        "size": _size(results),
        "frequency": _frequency(results),
        "gained": _types("Words that gain most", [row for row in types if row["nats"] > 0]),
        "lost": _types("Words that lose most", [row for row in types if row["nats"] < 0]),
        **(_gate_tables(results) if "gate_skip" in results["tables"] else {}),
    }


def interval(change: dict) -> str:
    """``low`` to ``high`` of a change, or that there is none."""
    if change["low"] is None:
        return NONE
    return f"{percent(change['low'], sign='+')} to {percent(change['high'], sign='+')}"


def units(change: dict) -> str:
    """What an interval was drawn from: ``15 documents``."""
    noun = change["unit"] if change["units"] != 1 else change["unit"].rstrip("s")
    return f"{change['units']:,} {noun}"


def _of_rows(
    caption: str, rows: Iterable[dict], columns: dict[str, Callable], text_columns: int = 0
) -> TextTable:
    """A table of the report's JSON; a column is a function that takes a row and gives a word."""
    words = [[column(row) for column in columns.values()] for row in rows]
    return TextTable(caption, list(columns), words, text_columns)


def _headline(results: dict) -> TextTable:
    tuned = results["tuned_on"]
    last = results.get("reported_on", tuned)
    splits = [tuned] if last["split"] == tuned["split"] else [tuned, last]
    columns = ["", *(split["split"] for split in splits), "change", "95% interval"]
    rows = []
    for name, words in _METHODS.items():
        if f"{name}_perplexity" in last:
            perplexities = [number(split[f"{name}_perplexity"]) for split in splits]
            rows.append([words, *perplexities, *_change(last.get(change_of(name)))])
    for name, words in BESIDES.items():
        if name in last:
            rows.append([words, *[""] * len(splits), *_change(last[name])])
    return TextTable(f"Perplexity; change and interval are of {last['split']}", columns, rows, 1)


def _change(change: Optional[dict]) -> tuple[str, str]:
    """A change and its interval; nothing for the model alone."""
    if change is None:
        return "", ""
    return percent(change["value"], sign="+"), interval(change)


def _neighbors(results: dict) -> TextTable:
    tuned, split = results["tuned_on"]["split"], results["split"]
    columns = {
        "k": lambda row: f"{row['k']:,}",
        "temperature": lambda row: f"{row['temperature']:.4g}",
        "lambda": lambda row: f"{row['knn_lambda']:.3f}",
        f"perplexity on {split}": lambda row: number(row["perplexity"]),
        "targets found": lambda row: percent(row["targets_found"]),
    }
    if split != tuned:
        columns[f"perplexity on {tuned}"] = lambda row: number(row["tuned_perplexity"])
    tables = results["tables"]
    rows = [{**a, **b} for a, b in zip(tables["k"], tables["found"])]
    return _of_rows("The best lambda and temperature for each k", rows, columns)


def _size(results: dict) -> TextTable:
    columns = {
        "entries": lambda row: f"{row['entries']:,}",
        "share": lambda row: percent(row["share"], 2),
        "neighbours taken": lambda row: f"{row['k']:,}" if row["k"] else "all known",
        "mean": lambda row: number(row["mean_neighbors"], 1),
        "queries with fewer": lambda row: (
            NONE if row["k"] is None else percent(row["queries_with_fewer"], 2)
        ),
        "lambda": lambda row: f"{row['knn_lambda']:.3f}",
        "perplexity": lambda row: number(row["perplexity"]),
    }
    caption = f"Parts of the datastore, perplexity on {results['split']}"
    return _of_rows(caption, results["tables"]["size"], columns)


def _frequency(results: dict) -> TextTable:
    columns = {
        "in the datastore": _frequency_label,
        "tokens": lambda row: f"{row['tokens']:,}",
        "share": lambda row: percent(row["share"]),
        "without": lambda row: number(row["base_perplexity"]),
        "with neighbours": lambda row: number(row["knn_perplexity"]),
        "change": lambda row: percent(row["relative_change"], sign="+"),
        "95% interval": interval,
        "drawn from": units,
        "nats gained": lambda row: number(row["nats"], 0, "+"),
    }
    tables = results["tables"]
    unknown = [row for row in tables["unknown"] if row["words"] != "known"]
    caption = f"Perplexity on {results['split']} by how often the target is in the datastore"
    return _of_rows(caption, [*tables["frequency"], *unknown], columns, 1)


def _frequency_label(row: dict) -> str:
    """A bucket of frequencies, in words."""
    if "words" in row:
        return row["words"]
    return _range(row, "{:,}")


def _range(row: dict, form: str) -> str:
    """``lowest`` and ``highest`` of a group, or what they have in common."""
    ends = [form.format(row[name]) for name in ("lowest", "highest")]
    return "\N{EN DASH}".join(dict.fromkeys(ends))


def _types(caption: str, rows: list[dict]) -> TextTable:
    columns = {
        "token": lambda row: row["token"],
        "nats": lambda row: number(row["nats"], 1, "+"),
        "occurrences": lambda row: f"{row['occurrences']:,}",
        "factor": lambda row: factor(row["mean_log_ratio"]),
        "in the datastore": lambda row: f"{row['training_count']:,}",
    }
    return _of_rows(caption, rows, columns, 1)


# -- of a gate -------------------------------------------------------------------------------------

_GATE_GROUPS = {
    "gate_frequency": ("in the datastore", "{:,}"),
    "gate_quality": ("d_1 / d_k", "{:.2f}"),
    "gate_entropy": ("entropy of p_lm", "{:.1f}"),
}


def _gate_tables(results: dict) -> dict[str, TextTable]:
    tables = {"gate_trust": _gate_trust(results), "gate_whom": _gate_whom(results)}
    if results["tables"]["gate_skip"]:
        tables["gate_skip"] = _gate_skip(results)
    return tables


def _gate_trust(results: dict) -> TextTable:
    """Groups of tokens, one kind below the other."""
    columns = {
        "tokens by": lambda row: row["measure"],
        "from, to": lambda row: row["range"],
        "tokens": lambda row: f"{row['tokens']:,}",
        "lambda": lambda row: f"{row['knn_lambda']:.3f}",
        "without": lambda row: number(row["base_perplexity"]),
        "constant": lambda row: number(row["constant_perplexity"]),
        "gate": lambda row: number(row["gate_perplexity"]),
    }
    rows = [
        {**row, "measure": measure, "range": _range(row, form)}
        for name, (measure, form) in _GATE_GROUPS.items()
        for row in results["tables"].get(name, [])
    ]
    return _of_rows(f"Mean lambda and perplexity on {results['split']}", rows, columns, 2)


def _gate_whom(results: dict) -> TextTable:
    columns = {
        "weights": lambda row: row["weights"],
        "helped": lambda row: percent(row["helped"]),
        "hurt": lambda row: percent(row["hurt"]),
        "nats gained": lambda row: number(row["nats_gained"], 0),
        "nats lost": lambda row: number(-row["nats_lost"], 0),
    }
    caption = f"Tokens of {results['split']} that neighbours help and hurt"
    return _of_rows(caption, results["tables"]["gate_helped_or_hurt"], columns, 1)


def _gate_skip(results: dict) -> TextTable:
    columns = {
        "--knn-skip": lambda row: f"{row['skip']:.2f}",
        "left out": lambda row: percent(row["skipped"]),
        "perplexity": lambda row: number(row["perplexity"]),
        "tokens a second": lambda row: (
            f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else NONE
        ),
    }
    caption = f"Searches left out, perplexity on {results['split']}"
    return _of_rows(caption, results["tables"]["gate_skip"], columns)
