"""The site: it builds without a warning, its links hold, it asks nothing of other servers, and a
browser that follows its navigation finds every page.
"""

import functools
import html.parser
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

import ijepa_fast
import ijepa_kernels
from ijepa_kernels import optim, testing
from tests.visualize.test_report import BROWSER, BROWSERS

ROOT = Path(__file__).parents[1]

pytest.importorskip("material", reason="the site needs the extra docs")
pytest.importorskip("mkdocstrings", reason="the site needs the extra docs")


class _Page(html.parser.HTMLParser):
    """What a page links to, what it loads by itself, and its anchors."""

    def __init__(self, path):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        of = {name: value or "" for name, value in attrs}
        self.anchors |= {of[name] for name in ("id", "name") if name in of}
        for name in {"href", "src", "srcset", "data"} & of.keys():
            (self.links if tag == "a" else self.loads).append(of[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. A warning is an error, but for `--quiet`, which would not count it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", "docs/site/mkdocs.yml"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "-d", str(folder)],
        cwd=ROOT,
        env=quiet,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Every page but the one of wrong addresses, by its path."""
    return {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_links_and_anchors_lead_somewhere(site, pages):
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(urljoin(path.as_uri(), link))
            if url.scheme != "file":
                assert link in page.links, f"{path}: {link} is loaded from outside"
                continue
            target = Path(unquote(url.path))
            assert target.is_relative_to(site), f"{path}: {link}"
            assert target.is_file(), f"{path}: {link}"
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].anchors, f"{path}: {link}"


def test_every_document_is_a_page(site, pages):
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/log/*.md")]
    for path in [*documents, ROOT / "kernels" / "README.md"]:
        name = path.relative_to(ROOT).with_suffix(".html").as_posix()
        assert site / name.replace("README", "index") in pages, path


def test_public_names_are_in_the_reference(pages):
    anchors = set().union(*(page.anchors for page in pages.values()))
    for package, names in (
        ("ijepa_kernels", {*ijepa_kernels.__all__, *optim.__all__, *testing.__all__}),
        ("ijepa_fast", set(getattr(ijepa_fast, "__all__", ()))),
    ):
        there = {name.rpartition(".")[2] for name in anchors if name.startswith(f"{package}.")}
        assert not names - there


class _Browser:
    """A headless Chromium with one page, spoken to over pipes in DevTools' protocol."""

    def __init__(self, folder):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command = [str(BROWSER), *options, f"--user-data-dir={folder}", "about:blank"]
        # it reads from 3 and writes to 4
        pipes = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._count, self._session = b"", 0, {}
        self.requests: list[str] = []
        self.errors: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(found["targetId"] for found in targets if found["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def _message(self):
        """The next one; what pages ask for and their errors are kept."""
        while b"\0" not in self._rest:
            read = os.read(self._in, 1 << 16)
            assert read, "the browser has ended"
            self._rest += read
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") in ("Runtime.exceptionThrown", "Network.loadingFailed"):
            self.errors.append(str(message["params"]))
        return message

    def call(self, method, **params):
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def value(self, expression):
        """Of JavaScript; a promise's when it is kept."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def load(self, expression):
        """Does what leads to another page, and waits until that has loaded."""
        self.value(expression)
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def close(self):
        self._process.terminate()
        self._process.wait(timeout=30)
        os.close(self._in)
        os.close(self._out)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def address(site):
    """Of the site on a server of this machine: search needs one."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def browser(tmp_path):
    started = _Browser(tmp_path / "browser")
    yield started
    started.close()


# a page's own headings stand in it, too
NAVIGATION = "[...document.querySelectorAll('nav.md-nav--primary a[href]:not([href^=\"#\"])')]"
SHOWN = """({
    title: document.title,
    heading: document.querySelector('article h1').innerText,
    active: document.querySelector('nav.md-nav--primary a.md-nav__link--active').href,
    text: document.querySelector('article').innerText.length,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
})"""
SEARCH = """(async () => {
    document.querySelector('#__search').click();
    const field = document.querySelector('.md-search__input');
    field.focus(); field.value = 'gather_tokens';
    field.dispatchEvent(new Event('input', {bubbles: true}));
    field.dispatchEvent(new Event('keyup', {bubbles: true}));
    for (let wait = 0; wait < 200; wait++) {
        const found = document.querySelectorAll('.md-search-result__link');
        if (found.length) return [...found].map(link => link.href);
        await new Promise(after => setTimeout(after, 50));
    }
    return [];
})()"""


@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: {', '.join(BROWSERS)}")
def test_a_browser_follows_the_navigation(site, pages, address, browser):
    browser.load(f"void (location = '{address}index.html')")
    links = list(dict.fromkeys(browser.value(f"{NAVIGATION}.map(link => link.href)")))
    assert {site / link.removeprefix(address) for link in links} == set(pages)
    for link in links:
        browser.load(f"{NAVIGATION}.find(to => to.href === '{link}').click()")
        assert browser.value("location.href") == link
        shown = browser.value(SHOWN)
        assert shown["active"] == link
        assert shown["heading"]
        assert "ijepa-fast" in shown["title"]
        assert shown["text"] > 50, link
        assert not shown["broken"]
        # on a telephone nothing is wider than the screen
        size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", **size)
        assert browser.value("document.scrollingElement.scrollWidth") <= 360, link
        browser.call("Emulation.clearDeviceMetricsOverride")
    assert any("kernels" in link for link in browser.value(SEARCH))
    assert not browser.errors
    outside = [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))]
    assert not outside
