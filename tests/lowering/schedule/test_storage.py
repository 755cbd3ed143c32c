"""Tuned times on disk: what was saved comes back; whatever else became of a file counts as nothing and is said once."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import resource
import signal
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowering.errors import ReasonCode
from lowering.inductor import identity
from lowering.schedule import storage
from lowering.schedule.device import H100, H200
from lowering.schedule.plan import candidates
from lowering.schedule.schedule import GemmShape, Schedule, numbers_of
from tests.support.tuned import model_times, tuned_folder

SHAPE = GemmShape(8, 256, 128, True)
KEY = storage.key_of(H100)
TABLE = {SHAPE: {rows: model_times(SHAPE, H100, rows, count=3) for rows in (8, 64)}}
ROOT = storage._root  # the real one: tests get another, see tests/conftest.py
OTHER = {GemmShape(8, 128, 256, False): {16: model_times(SHAPE, H100, 16, count=2)}}


@pytest.fixture
def folder(tmp_path):
    with tuned_folder(tmp_path) as folder:
        yield folder


@pytest.fixture
def file(folder):
    assert storage.save(KEY, TABLE) is None
    return folder / KEY.file_name


def missed(caplog, *, warnings=1):
    """That nothing is loaded, with so many warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffulex"):
        assert storage.load(KEY) == {}
    assert len(caplog.records) == warnings
    return caplog.text


schedules = st.sampled_from(candidates(SHAPE, H100))
seconds = st.floats(min_value=1e-12, max_value=1e3)
shapes = st.builds(GemmShape, *[st.integers(1, 1 << 20)] * 3, st.booleans(), st.sampled_from([2, 4]), st.booleans())
tables = st.dictionaries(
    shapes, st.dictionaries(st.integers(1, 1 << 40), st.dictionaries(schedules, seconds, max_size=3), max_size=3)
)


@given(tables)
def test_what_is_written_is_read(table):
    text = storage.encode(KEY, table)
    assert storage.decode(text, KEY) == table
    assert json.loads(text)["body"]["key"]["device"] == "H100"


@given(tables, shapes, schedules, seconds)
def test_equal_times_have_one_digest(table, shape, schedule, seconds):
    turned = {shape: dict(reversed(cells.items())) for shape, cells in reversed(table.items())}
    assert storage.digest_of(turned) == storage.digest_of(table)
    assert bool(storage.digest_of(table)) == any(times for cells in table.values() for times in cells.values())
    more = {**table, shape: {**table.get(shape, {}), 1 << 41: {schedule: seconds}}}
    assert storage.digest_of(more) != storage.digest_of(table)


def test_files_lie_among_inductors_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "caches"))
    monkeypatch.setattr(storage, "_root", ROOT)
    assert storage.save(KEY, TABLE) is None
    assert (tmp_path / "caches" / "diffulex" / KEY.file_name).is_file() and storage.load(KEY) == TABLE


def test_the_suite_does_not_see_what_was_tuned_here(tmp_path, monkeypatch):
    """Nor does it tune anything but in folders of its own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_root", ROOT)
        assert storage.save(KEY, TABLE) is None
    assert storage.load(KEY) == {}


def test_files_are_private_and_added_to(file, folder):
    assert storage.save(KEY, OTHER) is None
    newer = {SHAPE: {8: model_times(SHAPE, H100, 8, count=1)}}
    assert storage.save(KEY, newer) is None
    assert storage.load(KEY) == {SHAPE: {8: newer[SHAPE][8], 64: TABLE[SHAPE][64]}, **OTHER}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [KEY.file_name]


def test_nothing_was_tuned(folder, caplog):
    missed(caplog, warnings=0)
    assert not folder.exists(), "asking leaves nothing behind"


@pytest.mark.parametrize("field", ["device", "capability", "torch", "triton", "sources"])
def test_times_are_those_of_one_device_and_one_version(field, file, caplog):
    value = (8, 0) if field == "capability" else "another"
    other = storage.Key(**{**vars(KEY), field: value})
    assert storage.load(other) == {} and other.file_name != KEY.file_name
    file.rename(file.with_name(other.file_name))
    with caplog.at_level(logging.WARNING, logger="diffulex"):
        assert storage.load(other) == {}
    assert "another format, device or version" in caplog.text


def test_a_changed_template_is_another_key(tmp_path):
    for name in ("schedule/a.py", "templates/b.jinja", "other/c.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    hashes = [storage.hash_sources(tmp_path, "schedule", "templates")]
    for name in ("schedule/a.py", "templates/b.jinja", "other/c.py"):
        (tmp_path / name).write_text("y")
        hashes.append(storage.hash_sources(tmp_path, "schedule", "templates"))
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]
    own = [storage.hash_sources(identity._ROOT, *folders) for folders in (("schedule", "templates"), ("schedule",))]
    assert storage.key_of(H100).sources == own[0] != own[1]
    assert storage.key_of(H100).device != storage.key_of(H200).device


def test_cut_off_anywhere(file, caplog):
    text = file.read_bytes()
    for index in range(64):
        file.write_bytes(text[: index * (len(text) - 1) // 63])
        assert "tuned times are not used: " in missed(caplog)
    file.write_bytes(text)
    assert storage.load(KEY) == TABLE


def test_any_bit_flipped(file, caplog):
    text = file.read_bytes()
    for index in range(96):
        place = index * (len(text) - 1) // 95
        file.write_bytes(text[:place] + bytes([text[place] ^ 1 << index % 8]) + text[place + 1 :])
        missed(caplog)


def body(**changes):
    return json.loads(storage.encode(KEY, TABLE))["body"] | changes


def gemm(**changes):
    return body(gemms=[body()["gemms"][0] | changes])


def shape(**changes):
    return gemm(shape=body()["gemms"][0]["shape"] | changes)


def times(*values):
    return gemm(cells=[{"rows": 8, "times": list(values)}])


NUMBERS = numbers_of(Schedule(16, 64, 128, 4, 3))


@pytest.mark.parametrize(
    "wrong",
    [
        *[[], "text", 7, None, {}, body(format=2), body(key={}), body(gemms=None), body(gemms=[7])],
        *[gemm(shape={}), gemm(shape=None), gemm(cells=7), gemm(cells=[{"rows": 0, "times": []}]), gemm(cells=[{}])],
        *[shape(depth=1.5), shape(gated=1), shape(num_experts=True), shape(width="1")],
        *[times([1e-6]), times(7), times([*NUMBERS, 0.0]), times([*NUMBERS, -1.0]), times([*NUMBERS, 1])],
        *[times([*NUMBERS, "1"]), times([*NUMBERS[1:], 1e-6]), times(["a", *NUMBERS[1:], 1e-6])],
        *[times([-16, *NUMBERS[1:], 1e-6]), times([*NUMBERS, 7, 1e-6])],
    ],
    ids=lambda wrong: str(wrong)[-60:],
)
def test_a_sound_file_of_another_form(wrong, file, caplog):
    file.write_bytes(storage._sealed(wrong))
    missed(caplog)


@pytest.mark.parametrize("text", [b"", b"\x80\x04K\x07.", b"[" * 100_000, b'{"body":NaN,"sha256":""}\n', b"\xff\xfe"])
def test_another_kind_of_file(text, file, caplog):
    file.write_bytes(text)
    missed(caplog)


def to_link(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def to_folder(file):
    file.unlink()
    file.mkdir()


def to_pipe(file):
    file.unlink()
    os.mkfifo(file, 0o600)


def to_linked_folder(file):
    file.parent.rename(file.parent.with_name("elsewhere"))
    file.parent.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "change",
    [
        to_link,
        to_folder,
        to_pipe,
        to_linked_folder,
        lambda file: file.chmod(0o666),
        lambda file: file.parent.chmod(0o770),
        lambda file: os.truncate(file, storage._MOST_BYTES + 1),
    ],
    ids=["link", "folder", "pipe", "linked_folder", "writable", "writable_folder", "huge"],
)
def test_what_others_could_have_put_there(change, file, caplog):
    change(file)
    missed(caplog)


def failing(monkeypatch, name, number):
    """One of the calls fails that save makes, as it does where a disk is full or cannot be written to."""

    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, name, call)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("fsync", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("open", errno.EACCES),
        ("open", errno.EROFS),
        ("open", errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_a_disk_that_is_full_or_cannot_be_written_to(name, number, before, folder, monkeypatch):
    if before:
        assert storage.save(KEY, OTHER) is None
    with monkeypatch.context() as patch:
        failing(patch, name, number)
        reason = storage.save(KEY, TABLE)
    assert reason.code is ReasonCode.STORAGE and os.strerror(number) in reason.detail
    assert storage.load(KEY) == (OTHER if before else {})
    assert not list(folder.glob("*.tmp"))


def test_no_folder_can_be_made(folder, monkeypatch):
    failing(monkeypatch, "mkdir", errno.EROFS)
    assert storage.save(KEY, TABLE).code is ReasonCode.STORAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(file, folder):
    folder.chmod(0o500)
    assert storage.save(KEY, OTHER).code is ReasonCode.STORAGE
    assert storage.load(KEY) == TABLE
    folder.chmod(0o700)


def run_in_child(*jobs):
    """Exit codes of functions in processes of their own, all at once."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=job) for job in jobs]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def test_killed_in_the_middle_of_writing(file, folder):
    def die(descriptor):
        os.ftruncate(descriptor, 100)  # some of it had got to the disk
        os.kill(os.getpid(), signal.SIGKILL)

    def job():
        storage.os.fsync = die
        storage.save(KEY, OTHER)

    assert run_in_child(job) == [-signal.SIGKILL]
    assert list(folder.glob("*.tmp")), "it did die in the middle"
    assert storage.load(KEY) == TABLE
    assert storage.save(KEY, OTHER) is None, "the lock went with the process"
    assert storage.load(KEY) == {**TABLE, **OTHER}
    assert not list(folder.glob("*.tmp"))


def test_killed_at_any_time(file, folder, caplog):
    """While they write without a pause; what is there is one of the tables that were written, whole."""

    def job():
        for turn in itertools.count():
            storage.save(KEY, {SHAPE: {1 + turn % 50: TABLE[SHAPE][8]}})

    context, clock = multiprocessing.get_context("fork"), random.Random(0)
    with caplog.at_level(logging.WARNING, logger="diffulex"):
        for _ in range(24):
            child = context.Process(target=job)
            child.start()
            child.join(0.005 + 0.02 * clock.random())
            child.kill()
            child.join(60)
            assert storage.load(KEY).keys() == TABLE.keys() and not caplog.records
    assert storage.save(KEY, OTHER) is None and storage.load(KEY).keys() == {*TABLE, *OTHER}
    assert [path.name for path in folder.iterdir()] == [KEY.file_name]


def test_a_file_that_grows_no_further(file, folder):
    """The kernel's own refusal in the middle of a write, as on a disk that is full."""

    def job():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        reason = storage.save(KEY, OTHER)
        assert reason.code is ReasonCode.STORAGE and os.strerror(errno.EFBIG) in reason.detail

    assert run_in_child(job) == [0]
    assert storage.load(KEY) == TABLE
    assert [path.name for path in folder.iterdir()] == [KEY.file_name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_user_who_may_not_write():
    """As `test_a_folder_without_write_permission`, where the tests are run by root."""
    with tempfile.TemporaryDirectory() as root, tuned_folder(Path(root)) as folder:
        assert storage.save(KEY, TABLE) is None
        for path, mode in ((Path(root), 0o755), (folder, 0o500), (folder / KEY.file_name, 0o400)):
            os.chown(path, NOBODY, NOBODY)
            path.chmod(mode)

        def job():
            os.setuid(NOBODY)
            assert storage.load(KEY) == TABLE
            assert storage.save(KEY, OTHER).code is ReasonCode.STORAGE
            assert storage.load(KEY) == TABLE

        assert run_in_child(job) == [0]


NOBODY = 65534


def test_many_processes_lose_nothing(folder):
    times = TABLE[SHAPE][8]
    storage.load(KEY)

    def job(number):
        def save_all():
            for turn in range(20):
                assert storage.save(KEY, {SHAPE: {1 + number * 20 + turn: times}}) is None
                assert len(storage.load(KEY)[SHAPE]) > turn

        return save_all

    assert run_in_child(*map(job, range(8))) == [0] * 8
    assert storage.load(KEY) == {SHAPE: dict.fromkeys(range(1, 161), times)}


def test_a_lock_that_is_never_let_go(folder, monkeypatch):
    monkeypatch.setattr(storage, "_LOCK_SECONDS", 0.0)
    folder.mkdir(mode=0o700)
    with storage._locked(folder):
        assert storage.save(KEY, TABLE).code is ReasonCode.STORAGE
    assert storage.save(KEY, TABLE) is None
