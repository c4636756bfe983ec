"""A real browser: the page at two widths, and a notebook run in JupyterLab."""

import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Debian chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["made", "committed"])
def index(request, root, page):
    """The small page of the tests, and the committed one."""
    file = page if request.param == "made" else root / "figures" / "index.html"
    if not file.exists():
        pytest.skip("figures/index.html is not there yet: make figures")
    return file


@pytest.fixture(scope="module")
def served(index):
    """The page's folder over HTTP on loopback, as a repository's pages would serve it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=index.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


@pytest.mark.parametrize(
    ("width", "height", "scheme", "where"),
    [
        (390, 844, "light", "disk"),
        (390, 844, "dark", "http"),
        (1440, 900, "dark", "disk"),
        (1440, 900, "light", "http"),
    ],
)
def test_page_at_phone_and_desktop(browser, index, served, tmp_path, width, height, scheme, where):
    address = index.as_uri() if where == "disk" else served
    home = address.rsplit("/", 1)[0]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    view, asked, failed = context.new_page(), [], []
    view.on("request", lambda request: asked.append(request.url))
    view.on("requestfailed", lambda request: failed.append(request.url))
    view.goto(address, wait_until="load")
    view.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    for image in view.locator("img").all():
        image.scroll_into_view_if_needed()
    view.wait_for_function("Array.from(document.images).every(i => i.complete)")
    sizes = view.evaluate(
        "Array.from(document.images).map(i => [i.src, i.complete && i.naturalWidth, i.alt])"
    )
    assert sizes and all(width and alt for _, width, alt in sizes), sizes
    assert not failed
    assert all(url.startswith((home, "data:")) for url in asked), asked
    # What is too wide (tables) scrolls in its own box; the page itself does not.
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    tables = "t => t.closest('.wide') || t.offsetWidth <= document.documentElement.clientWidth"
    assert view.evaluate(f"Array.from(document.querySelectorAll('table')).every({tables})")
    # The contents stay in sight, and a figure opens in its full size.
    assert view.locator("nav").bounding_box()["y"] >= 0
    for link in view.locator("figure > a").all():
        assert link.get_attribute("href") == link.locator("img").get_attribute("src")
    ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 300) == (scheme == "dark")
    view.screenshot(path=tmp_path / "page.png", full_page=True)
    context.close()


@pytest.fixture
def lab(root, tmp_path):
    """JupyterLab on loopback over a folder with the notebooks; its address with the token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = {
        name: str(tmp_path / name)
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
                     "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_DATA_DIR")
    }  # fmt: skip
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--allow-root",
             "--IdentityProvider.token=a-test", f"--ServerApp.root_dir={tmp_path}",
             "--LabApp.news_url=", "--LabApp.check_for_updates_class="
             "jupyterlab.NeverCheckForUpdate"],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **folder},
        )  # fmt: skip
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "lab.log").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token=a-test&reset"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def parameterised(root: Path, notebook: str, target: Path, **values) -> Path:
    """A copy of a notebook whose parameters cell has other values, as a user would edit it."""
    book = nbformat.read(root / "notebooks" / notebook, as_version=4)
    (cell,) = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, target)
    return target


def run_all(browser, address: str, done: Path):
    """Open a notebook in JupyterLab, run all its cells and wait for the file `done`; the view."""
    view = browser.new_page(viewport={"width": 1400, "height": 1000})
    view.set_default_timeout(120_000)  # generous: other work may share the machine
    # On a busy machine a dialog of Lab's was seen to cover its menus.
    dialog = view.locator(".jp-Dialog")
    view.add_locator_handler(dialog, lambda: dialog.locator(".jp-mod-accept").first.click())
    view.goto(address)
    view.locator(".jp-NotebookPanel-toolbar").wait_for()
    idle = view.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    idle.wait_for()
    for _ in range(4):  # a click in the moment the kernel's connection is renewed is lost
        view.wait_for_timeout(2000)
        view.get_by_role("menuitem", name="Run", exact=True).click()
        view.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        for _ in range(120):
            view.wait_for_timeout(500)
            assert not view.locator(".jp-RenderedText .ansi-red-fg").count(), "a cell failed"
            if done.exists():
                idle.wait_for()
                return view
    raise AssertionError(f"{done} did not come")


def scroll_to(view, found) -> None:
    """Down the notebook until `found()`; Lab draws only the cells in sight."""
    panel = view.locator(".jp-WindowedPanel-outer").first
    for height in range(0, 12_000, 200):
        panel.evaluate("(element, height) => { element.scrollTop = height }", height)
        view.wait_for_timeout(200)
        if found():
            break


@pytest.mark.slow
def test_training_notebook_in_jupyterlab(browser, root, lab, tmp_path):
    notebook = root / "notebooks" / "02_train.ipynb"
    import yaml

    from dreamer.phantom import generate

    smoke = yaml.safe_load((root / "notebooks" / "parameters" / "smoke.yaml").read_text())
    data = generate(tmp_path / "scans", patients=4, frames=4, size=32)
    parameterised(
        root, notebook.name, tmp_path / "work" / "02_train.ipynb", **smoke, data=str(data),
        token_type="channel", run=str(tmp_path / "run"), output=str(tmp_path / "figures"),
    )  # fmt: skip
    done = tmp_path / "figures" / "02_accuracy.csv"
    view = run_all(browser, lab.format("work/02_train.ipynb"), done)
    tables = view.locator(".jp-OutputArea table")
    scroll_to(view, lambda: "translation" in " ".join(tables.all_inner_texts()))
    assert tables.count(), "no table was shown"
    tables.last.scroll_into_view_if_needed()
    shot = tmp_path / "lab.png"
    view.screenshot(path=shot)
    assert shot.stat().st_size > 10_000
    view.close()


@pytest.fixture
def two_runs(untrained, tmp_path):
    """The folders of an untrained run of patch and of channel tokens."""
    from dreamer.model import ModelConfig

    shape = dict(
        backbone="compact", image_size=64, channels=16, width=4, d_model=16, num_heads=2,
        num_layers=1, guidance=(32, 16),
    )  # fmt: skip
    variants = ("patch", "channel")
    return [str(untrained(tmp_path / v, ModelConfig(token_type=v, **shape))) for v in variants]


def press_right(view, slider, image) -> None:
    """Move a slider by the keyboard alone until its number and an image have changed."""
    before = image.get_attribute("src")
    readout = slider.locator(".widget-readout")
    readout.filter(has_text=re.compile(r"\d")).wait_for()  # Lab draws what came into sight
    # The text itself: what is being drawn again has no visible text for a moment.
    shown = float(readout.text_content().replace("−", "-"))
    slider.locator(".noUi-handle").focus()
    for _ in range(4):
        view.keyboard.press("ArrowRight")
    moved = "([e, x]) => Math.abs(parseFloat(e.textContent.replace('−', '-')) - x) > 1"
    view.wait_for_function(moved, arg=[readout.element_handle(), shown])
    view.wait_for_function("([e, src]) => e.src != src", arg=[image.element_handle(), before])


@pytest.mark.slow
def test_the_first_notebook_in_jupyterlab(browser, root, lab, two_runs, tmp_path):
    parameterised(
        root, "start_here.ipynb", tmp_path / "work" / "start_here.ipynb", patch=two_runs[0],
        channel=two_runs[1], output=str(tmp_path / "figures"),
    )  # fmt: skip
    done = tmp_path / "figures" / "00_start.csv"  # the last cell's
    view = run_all(browser, lab.format("work/start_here.ipynb"), done)
    slider = view.locator(".widget-slider").first
    scroll_to(view, slider.count)
    slider.scroll_into_view_if_needed()
    press_right(view, slider, view.locator(".jupyter-widgets.widget-image").first)
    shot = tmp_path / "start.png"
    view.screenshot(path=shot)
    assert shot.stat().st_size > 20_000
    view.close()


@pytest.mark.slow
def test_probe_is_moved_by_hand_in_jupyterlab(browser, root, lab, two_runs, tmp_path):
    parameterised(
        root, "09_explore.ipynb", tmp_path / "work" / "09_explore.ipynb", runs=two_runs,
        data=str(tmp_path / "none"), output=str(tmp_path / "figures"),
    )  # fmt: skip
    done = tmp_path / "figures" / "09_explore.png"  # the last cell's
    view = run_all(browser, lab.format("work/09_explore.ipynb"), done)
    button = view.get_by_role("button", name="go to the plane")
    scroll_to(view, button.count)
    button.scroll_into_view_if_needed()
    image = view.locator(".jupyter-widgets.widget-image").first
    press_right(view, view.locator(".widget-slider").first, image)
    button.click()
    report = view.get_by_text(re.compile(r"stopped after \d+ steps; error: [\d.]+ mm, [\d.]+ deg"))
    view.wait_for_timeout(1000)
    report.first.wait_for()
    found = re.search(r"error: ([\d.]+) mm, ([\d.]+) deg", report.first.inner_text())
    assert 0 <= float(found[1]) < 200 and 0 <= float(found[2]) <= 180
    view.get_by_role("button", name="new patient").click()
    view.get_by_text(re.compile(r"patient virtual_0001")).first.wait_for()
    shot = tmp_path / "explore.png"
    view.screenshot(path=shot)
    assert shot.stat().st_size > 20_000
    view.close()
