"""The API reference, made by the README's command, is complete and has no broken reference."""

import functools
import html
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jaxqat
from jaxqat import aqt

pytest.importorskip("pdoc")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Each page of the reference by its path in the folder."""
    folder = tmp_path_factory.mktemp("api")
    ((command),) = re.findall(r"^\.venv/bin/python (-m pdoc .*)$", README, re.MULTILINE)
    arguments = shlex.split(command)
    arguments[arguments.index("build/api")] = str(folder)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")
    }


def anchors(page: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', page))


def test_every_public_name_is_documented(pages):
    for file, module in (("jaxqat.html", jaxqat), ("jaxqat/quant/aqt.html", aqt)):
        names = {name for name in module.__all__ if name != "aqt"}
        assert names <= anchors(pages[file])
        bare = {n for n in names - {"__version__"} if not getattr(module, n).__doc__}
        assert not bare


def test_every_link_leads_to_a_page_and_a_place(pages):
    assert len(pages) == 3  # With the index.
    places = {name: anchors(page) for name, page in pages.items()}
    broken = []
    for name, page in pages.items():
        content = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        for link in re.findall(r'href="([^"]+)"', content):
            address, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", address):  # Another site, or an embedded picture.
                continue
            path = (Path("/") / Path(name).parent / address).resolve() if address else None
            target = name if path is None else path.relative_to("/").as_posix()
            if target not in pages or (anchor and anchor not in places[target]):
                broken.append(f"{name}: {link}")
    assert not broken


def resolves(name: str) -> bool:
    """Return whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
            functools.reduce(getattr, parts[end:], module)
            return True
        except (ImportError, AttributeError):
            continue
    return False


def test_every_name_of_jaxqat_in_the_reference_exists(pages):
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)) for page in pages.values())
    names = set(re.findall(r"\bjaxqat(?:\.[A-Za-z_]\w*)+", text))
    assert "jaxqat.convert" in names
    assert not {name for name in names if not resolves(name)}
