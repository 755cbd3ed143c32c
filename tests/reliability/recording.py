"""Pytest plugin: how each test ended, told at once, and tests that several processes share.

`--record FILE` appends a line of JSON for each test that is collected, where it begins and where it has ended: a
process that dies loses no result but that of the test it died in. With `--share FOLDER` each of several processes that
collect the same tests runs those that none of the others has begun; a file named by `--whole` is taken by one process.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

LEFT, BEGUN = "left", "begun"
ENDS = ("passed", "skipped", "failed")  # the worst of a test's phases is how it ended


def claim(folder, name):
    """Whether nobody has claimed it before."""
    try:
        os.close(os.open(Path(folder) / hashlib.sha256(name.encode()).hexdigest(), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Recorder:
    """Lines of `file`: {"node", "ended", "recorded"}; the last one of a test counts."""

    def __init__(self, file):
        self.file, self.ended = Path(file), {}

    def tell(self, node, ended, recorded=()):
        line = json.dumps({"node": node, "ended": ended, "recorded": [[key, str(value)] for key, value in recorded]})
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")

    def pytest_collection_finish(self, session):
        for item in session.items:
            self.tell(item.nodeid, LEFT)

    def pytest_runtest_logstart(self, nodeid):
        self.tell(nodeid, BEGUN)

    def pytest_runtest_logreport(self, report):
        node = report.nodeid
        self.ended[node] = max(self.ended.get(node, "passed"), report.outcome, key=ENDS.index)
        if report.failed or report.when == "teardown":
            self.tell(node, self.ended[node], report.user_properties)


class Shared:
    """A loop over the tests that takes those which no other process has taken, until a time (of `time.time`)."""

    def __init__(self, folder, whole, until):
        self.folder, self.whole, self.until, self.own = folder, whole, until, set()

    def takes(self, node):
        file = node.partition("::")[0]
        if file in self.whole and file not in self.own:
            if not claim(self.folder, file):
                return False
            self.own.add(file)
        return claim(self.folder, node)

    def pytest_runtestloop(self, session):
        if session.testsfailed or session.config.option.collectonly:  # of the collection: pytest's own loop says so
            return None
        for item in session.items:
            if time.time() > self.until:
                break
            if self.takes(item.nodeid):  # what comes next is not known, so all fixtures end with it
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return True


def pytest_addoption(parser):
    parser.addoption("--record", help="append how tests end to this file")
    parser.addoption("--share", help="run what no other process with this folder has begun")
    parser.addoption("--whole", action="append", default=[], help="a file that one process takes; may be repeated")
    parser.addoption("--until", type=float, default=float("inf"), help="begin no test after this time")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    options = config.option
    if options.record and not hasattr(config, "workerinput"):  # what xdist's workers say comes to their controller
        config.pluginmanager.register(Recorder(options.record))
    if options.share:
        config.pluginmanager.register(Shared(options.share, set(options.whole), options.until))
