"""Names that a server, a config or a log may hold, and what they would do where they are taken for more than text."""

from html.parser import HTMLParser

NAMES = (
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "javascript:alert(1)",
    "../../../../x",
    "/etc/x",
    "..",
    ".",
    "x" * 300,
    "nul\0",
    "$\\frac$",
    "back\\slash\\",
    "\x1b[31mred\x1b]0;title\x07",
    "\x9b31m",
    "\u202egpj.exe\u2066",
    "[bold]rich[/] [link=http://x]y[/link]",
    "{0} {name}",
    "=1+1",
    "+x",
    "-1.5",
    "1e3",
    "007",
    "true",
    "NA",
    "@x",
    "\t=x",
    "\r=x",
    "'=x",
    "''",
    "two\nlines",
    "two\rlines",
    'quote", comma',
    "case",
    "Case",
    "CASE",
    "é",
    "e\u0301",
    "runs",
)


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, its ids, labels and links, and its text."""

    def __init__(self, page):
        super().__init__()
        self.found, self.ids, self.labels, self.links, self.words = set(), [], [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found |= {(tag, name) for name, _ in (("", ""), *attrs)}
        self.ids += [value for name, value in attrs if name == "id"]
        self.labels += [value for name, value in attrs if name == "aria-label"]
        self.links += [value for name, value in attrs if name in ("href", "xlink:href", "src")]

    def handle_data(self, data):
        self.words += data
