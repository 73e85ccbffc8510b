"""Reads an HTML page: its tags, what it refers to, and its text."""

import html.parser


class Page(html.parser.HTMLParser):
    """A page; fails where its tags do not close.

    Attributes:
        tags (list of str): as they are opened.
        attributes (list of tuple): tag, name and value of each attribute.
        text (str): all of it.
        text_of (dict): by the id of an element, the text within it.
    """

    VOID = {"meta", "link", "br", "img"}

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.text_of = [], [], "", {}
        self._open = []
        self.feed(source)
        assert self._open == []

    @property
    def references(self):
        """The values of every ``src`` and ``href``."""
        return [value for _, name, value in self.attributes if name in ("src", "href")]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in self.VOID:
            self._open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        for name in {name for _, name in self._open if name}:
            self.text_of[name] = self.text_of.get(name, "") + data
