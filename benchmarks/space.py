"""Measure how long a visitor of the Space waits: after a start of its process, and when it is warm."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gradio_client import Client

from benchmarks.common import ROOT, commit, machine, table, write_section
from hf_context_prune.publishing.space.settings import DEMO_FOLDER

APP = ROOT.parent / "spaces" / "app.py"
DOMAIN = "Software licences"
PROMPT = "Redistribution and use in source and binary forms, with or without modification,"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--folder", type=Path, default=Path(), help=f"folder in which `demo` wrote {DEMO_FOLDER}")
    options.add_argument("--starts", type=int, default=3, help="starts of the process")
    options.add_argument("--asks", type=int, default=10, help="warm requests after the last start")
    options.add_argument(
        "--screenshot", type=Path, help="also write a picture of the page, taken with Debian's chromium"
    )
    args = options.parse_args()
    listening, cold, warm = [], [], []
    for start in range(args.starts):
        began = time.perf_counter()
        with Server(args.folder) as server:
            listening.append(time.perf_counter() - began)
            cold.append(first_tokens(server.address, since=began))
            if start == args.starts - 1:
                warm = [first_tokens(server.address) for _ in range(args.asks)]
                if args.screenshot:
                    picture(server.address, args.screenshot)
    rows = [
        ["start of the process to the page", spread(listening), ""],
        ["start of the process to the first token of both models", spread(cold), verdict(cold, 30)],
        ["warm: request to the first token of both models", spread(warm), verdict(warm, 2)],
    ]
    write_section(
        "space",
        f"""## The Space

`spaces/app.py` with SmolLM2-135M-Instruct and the model that `hf-context-prune demo` pruned from it (float32), a prompt of
{len(PROMPT.split())} words, sent over HTTP by gradio_client. Each start is a new process; the files are in the page
cache. Seconds, median and range of {args.starts} starts and {args.asks} warm requests.

{table(["", "seconds", "goal"], rows)}

`python -m benchmarks.space --folder FOLDER` at `{commit()}`, {os.cpu_count()} cores, load average
{os.getloadavg()[0]:.1f} at the end, {machine()}.
""",
    )


class Server:
    """The Space in its own process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Server:
        environment = os.environ | {"GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, APP], cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        for line in self.process.stdout or ():
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.address = found.group()
                return self
        raise SystemExit("The Space did not start.")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)


def first_tokens(address: str, *, since: float | None = None) -> float:
    """Return the seconds to the first token of both models, from `since` or from the request.

    Raises:
        SystemExit: A model wrote nothing.
    """
    client = Client(address, verbose=False)
    asked = time.perf_counter() if since is None else since
    answered: float | None = None
    for view in client.submit(DOMAIN, PROMPT, new_tokens=16, api_name="/compare"):
        both = all(view[side]["tokens"] for side in ("dense", "pruned"))
        if both and answered is None:
            answered = time.perf_counter() - asked
    if answered is None:
        raise SystemExit(f"A model wrote nothing: {view}")
    return answered


def spread(seconds: list[float]) -> str:
    """Return median and range as text."""
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def verdict(seconds: list[float], goal: float) -> str:
    """Return the goal, and whether all values meet it."""
    return f"under {goal}: {'met' if max(seconds) < goal else 'missed'}"


def picture(address: str, path: Path) -> None:
    """Write a picture of the page after one comparison."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1080, "height": 900})
        page.goto(address)
        page.click("#examples button")
        page.wait_for_function("document.querySelector('#prompt textarea').value != ''")
        page.click("#run")
        page.wait_for_function("/times as fast/.test(document.querySelector('#status').innerText)", timeout=120_000)
        page.locator("#surprise .pieces").wait_for()
        page.screenshot(path=path, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
