"""A page as a browser would read it."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """The parsed page: tags, attributes, tables, embedded images."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tags: list[tuple[str, dict]] = []
        self.tables_outside_scroll = 0
        self.images: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "table" and not any(a.get("class") == "scroll" for _, a in self.open):
            self.tables_outside_scroll += 1
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("img", "source"):
            self.images.append(attributes.get("src") or attributes.get("srcset") or "")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        names = [tag for tag, _ in self.open]
        if "td" in names or "th" in names:
            self.rows[-1][-1] += data
        if "style" not in names:
            self.text += data
