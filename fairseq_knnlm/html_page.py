"""What our HTML pages have in common: each is one file, needs no network and may load nothing."""

from html import escape

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem 1.5rem 3rem; background: #fff;
  color: #1b1b1b; font: 1rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
small { color: #595959; font-weight: normal; }
header p { margin: .4rem 0; }
dl { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; margin: 0 0 .6rem; font-size: .85rem; }
dl div { display: flex; gap: .4rem; }
dt { color: #595959; }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; }
th { font-weight: normal; font-size: .85rem; color: #595959; border-bottom: 1px solid #bbb; }
@media print {
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { padding: 0; max-width: none; font-size: 10pt; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, style: str, body: str) -> str:
    """A page.

    Args:
        title (str): text; it is escaped.
        style (str): CSS besides that of all pages.
        body (str): HTML, in which what comes from data is escaped already.

    Returns:
        str: the whole file.
    """
    return _PAGE.format(title=escape(title), style=_STYLE + style, body=body)


def definitions(facts: dict) -> str:
    """Names and values, in as many lines as they need, as HTML; both are escaped."""
    pairs = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f"<dl>{pairs}</dl>"
