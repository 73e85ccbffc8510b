"""Which memories spoke for each token of a passage, as data, as lines for a terminal, as a page.

``tokens`` says what is known of scored tokens and of their neighbours; ``as_text`` and ``as_html``
show it. Imports from the root, ``probability`` and ``datastore``: what is shown has been encoded
and searched already.
"""

from .as_html import render as render_html
from .as_text import render as render_text
from .tokens import Guess, Inspector, Lines, Memory, Passage, Token, place_in_words

__all__ = [
    "Guess",
    "Inspector",
    "Lines",
    "Memory",
    "Passage",
    "Token",
    "place_in_words",
    "render_html",
    "render_text",
]
