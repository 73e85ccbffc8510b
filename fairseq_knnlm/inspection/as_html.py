"""A passage and its memories as one HTML page that needs no network.

Every token is a link to its memories. Without a script the browser shows the one that is linked to;
a few lines of script add the arrow keys and keep the page from jumping. In print the memories of
the tokens that changed most follow the text. What comes from data is escaped, and a content
security policy in the page forbids it to load anything.
"""

import bisect
import math
from collections.abc import Iterator
from html import escape

from ..html_page import definitions, page
from .tokens import Memory, Passage, Token, place_in_words

# A token's shade depends on p_mixture / p_lm: these are the bounds between shades.
_RATIOS = (0.5, 0.8, 0.95, 1.05, 1.25, 2.0)
# Background and text of each shade, from hurt to helped. Orange and blue differ for every kind of
# colour blindness; the underline tells them apart without any colour.
_SHADES = (
    ("#b85c00", "#ffffff"),
    ("#f5b266", "#1b1b1b"),
    ("#fde6cb", "#1b1b1b"),
    ("transparent", "#1b1b1b"),
    ("#dbe8f7", "#1b1b1b"),
    ("#94bfe8", "#1b1b1b"),
    ("#1f5fa8", "#ffffff"),
)
_UNDERLINES = ("dotted",) * 3 + ("hidden",) + ("solid",) * 3
_UNCHANGED = len(_RATIOS) // 2
_LN_RATIOS = tuple(map(math.log, _RATIOS))
# So many of the tokens that were helped most, and as many of those that were hurt most, are listed
# above the text, and have their memories in print.
_EXTREMES = 10
_NONE = "\N{EN DASH}"


def render(passage: Passage) -> str:
    """The page of a passage, as HTML."""
    helped, hurt = _extremes(passage)
    printed = {token.index for token in helped + hurt}
    memories = "\n".join(
        _memories(token, passage, token.index in printed) for token in passage.tokens
    )
    body = _BODY.format(
        title=escape(passage.source),
        script=_SCRIPT,
        summary=_summary(passage),
        legend="".join(_legend()),
        extremes=_extremes_list("Helped most", helped) + _extremes_list("Hurt most", hurt),
        passage="\n".join(_text(passage)),
        memories=memories,
    )
    style = _STYLE + "".join(_shade_styles())
    return page(f"Memories of {passage.source}", style, body)


def shade(log_ratio: float) -> int:
    """0, hurt most, to 6, helped most; 3 where the probability changed by less than 5%."""
    return bisect.bisect_right(_LN_RATIOS, log_ratio)


def _extremes(passage: Passage) -> tuple[list, list]:
    ordered = sorted(passage.tokens, key=lambda token: token.log_ratio)
    hurt = [token for token in ordered[:_EXTREMES] if shade(token.log_ratio) < _UNCHANGED]
    helped = [token for token in ordered[-_EXTREMES:] if shade(token.log_ratio) > _UNCHANGED]
    return helped[::-1], hurt


def _summary(passage: Passage) -> str:
    perplexities = passage.perplexities()
    return (
        f"<p>{len(passage.tokens):,} tokens, perplexity <b>{perplexities['lm']:.2f}</b> without "
        f"neighbours, <b>{perplexities['mixture']:.2f}</b> with them.</p>\n"
        + definitions(passage.settings)
    )


def _shade_styles() -> Iterator[str]:
    for number, ((background, color), line) in enumerate(zip(_SHADES, _UNDERLINES)):
        yield (
            f".s{number} {{ background: {background}; color: {color}; "
            f"border-bottom: 3px {line} #111; }}\n"
        )


def _legend() -> Iterator[str]:
    bounds = [f"{ratio:g}" for ratio in _RATIOS]
    middle = [f"{low} to {high}" for low, high in zip(bounds, bounds[1:])]
    for number, label in enumerate([f"below {bounds[0]}", *middle, f"{bounds[-1]} and more"]):
        yield f'<li><span class="s{number}">{label}</span></li>'


def _extremes_list(title: str, tokens: list) -> str:
    if not tokens:
        return ""
    links = " ".join(
        _link(token, f"{escape(token.text)}&nbsp;{_factor(token)}") for token in tokens
    )
    return f"<p><b>{title}:</b> {links}</p>"


def _text(passage: Passage) -> Iterator[str]:
    links: list = []
    for token in passage.tokens:
        links.append(_link(token, escape(token.text), f' id="t{token.index}"'))
        if token.ends_line:
            yield f'<p dir="auto">{" ".join(links)}</p>'
            links = []
    if links:
        yield f'<p dir="auto">{" ".join(links)}</p>'


def _link(token: Token, label: str, attributes: str = "") -> str:
    classes = f"token s{shade(token.log_ratio)}" + (" unknown" if token.unknown else "")
    return f'<a href="#m{token.index}"{attributes} class="{classes}">{label}</a>'


def _memories(token: Token, passage: Passage, printed: bool) -> str:
    """The memories of a token; *printed*: also on paper."""
    unknown = "<p>The model sees <b>&lt;unk&gt;</b> here.</p>" if token.unknown else ""
    items = "\n".join(_memory(memory, passage.datastores) for memory in token.neighbors)
    k = passage.settings["k"]
    p_knn = _NONE if math.isnan(token.p_knn) else f"{token.p_knn:.3g}"
    return (
        f'<section id="m{token.index}" class="memory{" printed" if printed else ""}" '
        f'aria-label="memories of token {token.index}">\n'
        f'<h2><span class="s{shade(token.log_ratio)}">{escape(token.text)}</span> '
        f"<small>token {token.index:,}</small></h2>\n{unknown}"
        "<table><thead><tr><th>p_lm</th><th>p_knn</th><th>mixture</th><th>mixture / p_lm</th></tr>"
        f"</thead><tbody><tr><td>{token.p_lm:.3g}</td><td>{p_knn}</td>"
        f"<td>{token.p_mixture:.3g}</td><td>{_factor(token)} <small>(ln "
        f"{token.log_ratio:+.2f})</small></td></tr></tbody></table>\n"
        f"<p>{token.matching:,} of {k:,} neighbours have this token; the nearest:</p>\n"
        f"<ol>{items}</ol>\n</section>"
    )


def _factor(token: Token) -> str:
    ratio = math.exp(min(token.log_ratio, 700.0))
    form = ".2f" if ratio < 10 else ",.0f" if ratio < 1e6 else ".1e"
    return f"\N{MULTIPLICATION SIGN}{ratio:{form}}"


def _memory(memory: Memory, datastores: int) -> str:
    kind, note = ("same", ", the same token") if memory.matches else ("other", "")
    before, after = (escape(" ".join(part)) for part in (memory.before, memory.after))
    return (
        f'<li value="{memory.rank}"><p class="context">{before} '
        f'<mark class="{kind}">{escape(memory.token)}</mark> {after}</p>\n'
        f'<p class="facts"><span class="bar" aria-hidden="true">'
        f'<i style="width: {100 * memory.weight:.1f}%"></i></span> weight {memory.weight:.3f}, '
        f"distance {memory.distance:.2f}{note}<br>{place_in_words(memory, datastores)}</p></li>"
    )


_STYLE = """
.legend { list-style: none; display: inline-flex; flex-wrap: wrap; gap: .3rem; padding: 0;
  margin: 0; font-size: .85rem; }
.legend span { padding: .1rem .5rem; display: inline-block; }
.extremes { font-size: .9rem; }
.columns { display: grid; grid-template-columns: minmax(0, 3fr) minmax(22rem, 2fr); gap: 2rem;
  border-top: 1px solid #bbb; margin-top: .8rem; padding-top: .4rem; }
.passage { line-height: 2; overflow-wrap: anywhere; }
.token { text-decoration: none; border-radius: 2px; padding: .1rem .2rem; }
.token.unknown { font-style: italic; }
.token.unknown::after { content: "?"; font-size: .75em; vertical-align: super; }
.token:hover { outline: 2px solid #888; }
.token:focus-visible, .token[aria-current] { outline: 3px solid #111; outline-offset: 1px; }
aside { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto;
  padding: .8rem 0 .8rem 1rem; border-left: 1px solid #bbb; }
.memory { display: none; }
html:not(.scripted) .memory:target, .memory.open { display: block; }
html:not(.scripted) aside:has(:target) .hint, aside.chosen .hint { display: none; }
.only-print { display: none; }
ol { padding-left: 2.6rem; margin: .4rem 0; }
li p { margin: 0; }
ol li { margin-bottom: .9rem; }
.context { overflow-wrap: anywhere; }
mark { background: none; color: inherit; font-weight: bold; padding: 0 .25rem;
  border: 1px solid #555; border-radius: 3px; }
mark.same { border: 2px solid #1f5fa8; background: #dbe8f7; }
.facts { font-size: .85rem; color: #454545; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; width: 5rem; height: .6rem; border: 1px solid #777; }
.bar i { display: block; height: 100%; background: #555; }
@media screen and (max-width: 60rem) {
  html { scroll-padding-bottom: 55vh; }
  .columns { display: block; }
  aside { position: sticky; top: auto; bottom: 0; max-height: 50vh; background: #fff;
    border-left: 0; border-top: 2px solid #555; padding: .6rem 0; }
}
@media print {
  .hint { display: none; }
  .only-print, .memory.printed, .memory.open { display: block; }
  .columns { display: block; }
  .passage { line-height: 1.8; }
  aside { position: static; max-height: none; overflow: visible; border: 0; padding: 0; }
  ol li { margin-bottom: .4rem; }
  .memory { break-inside: avoid; border-top: 1px solid #bbb; padding-top: .5rem; }
  .token[aria-current] { outline: none; }
}
"""

_SCRIPT = """
"use strict";
document.documentElement.classList.add("scripted");
const aside = document.querySelector("aside");
const tokens = [...document.querySelectorAll(".passage .token")];
let link = null;
let memory = null;

function open(name) {
  const found = document.getElementById(name);
  if (!found || !found.classList.contains("memory")) return;
  if (memory) memory.classList.remove("open");
  if (link) link.removeAttribute("aria-current");
  memory = found;
  link = document.getElementById("t" + name.slice(1));
  memory.classList.add("open");
  link.setAttribute("aria-current", "true");
  link.scrollIntoView({ block: "nearest" });
  aside.classList.add("chosen");
  aside.scrollTop = 0;
  history.replaceState(null, "", "#" + name);
}

document.addEventListener("click", (event) => {
  const clicked = event.target.closest(".token");
  if (!clicked) return;
  event.preventDefault();
  open(clicked.hash.slice(1));
});

document.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const next = link ? tokens[tokens.indexOf(link) + step] : tokens[0];
  if (!next) return;
  event.preventDefault();
  next.focus();
  open(next.hash.slice(1));
});

window.addEventListener("hashchange", () => open(location.hash.slice(1)));
open(location.hash.slice(1));
"""

_BODY = """<header>
<h1>{title}</h1>
{summary}
<p>Probability with neighbours / without:</p>
<ul class="legend">{legend}</ul>
<p><small>Solid line: the neighbours helped. Dotted line: they hurt. Italic with ?: the model does \
not know the word and sees &lt;unk&gt;.</small></p>
<div class="extremes">{extremes}</div>
</header>
<div class="columns">
<main class="passage">
{passage}
</main>
<aside aria-live="polite">
<p class="hint">Choose a token to see its memories: click it, or reach it with the Tab key and \
press Enter. The arrow keys \N{LEFTWARDS ARROW} and \N{RIGHTWARDS ARROW} go from one to the \
next.</p>
<h2 class="only-print">Memories of the tokens that changed most</h2>
{memories}
</aside>
</div>
<script>{script}</script>
"""
