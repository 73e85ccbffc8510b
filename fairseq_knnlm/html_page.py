"""HTML pages from the package's templates: each is one file, needs no network and may load nothing.

Templates are those of Jinja (https://jinja.palletsprojects.com), named by their paths within the
package. What is data is escaped, a name that the template misspells is an error, and style sheets
and scripts are files of their own that ``include`` puts into the page.
"""

import functools
import math
from pathlib import Path

import jinja2

# What is shown where there is no number.
NONE = "\N{EN DASH}"


def render_page(template: str, **values) -> str:
    """A page.

    Args:
        template (str): its path within the package, ``inspection/templates/passage.html.j2`` say.
        values: what the template shows; texts are escaped.

    Returns:
        str: the whole file.
    """
    return environment().get_template(template).render(values)


@functools.cache
def environment() -> jinja2.Environment:
    """How all pages are rendered; the filters are the functions of this module."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(number=number, percent=percent, factor=factor, probability=probability)
    made.filters.update(grouped="{:,}".format)
    return made


# -- numbers in words ------------------------------------------------------------------------------


def number(value: float, decimals: int = 2, sign: str = "") -> str:
    """A number in words.

    Args:
        value (float): may be infinite.
        decimals (int): digits behind the point.
        sign (str): ``+`` where positive numbers have one as well.
    """
    return f"{value:{sign},.{decimals}f}" if math.isfinite(value) else "infinite"


def percent(value: float, decimals: int = 1, sign: str = "") -> str:
    """A share in percent.

    Args:
        value (float): the share; 0.25 is 25%.
        decimals (int): of the percentage.
        sign (str): "+" to have one in front of what is positive; "": none.
    """
    return f"{value:{sign}.{decimals}%}" if math.isfinite(value) else "infinite"


def factor(log_ratio: float) -> str:
    """The ratio of which *log_ratio* is the natural logarithm: ×1.25, ×3.2e+07."""
    ratio = math.exp(min(log_ratio, 700.0))
    form = ".2f" if ratio < 10 else ",.0f" if ratio < 1e6 else ".1e"
    return f"\N{MULTIPLICATION SIGN}{ratio:{form}}"


def probability(value: float) -> str:
    """A probability in three digits; a dash for nan, where there is none."""
    return NONE if math.isnan(value) else f"{value:.3g}"
