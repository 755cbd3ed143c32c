import pytest

from tests.support.expected import Expected, normalise


def test_what_was_accepted_is_expected_and_changes_are_shown(tmp_path):
    Expected(accept=True, folder=tmp_path)("kernel", "a = 1\nb = 2\n")
    check = Expected(accept=False, folder=tmp_path)
    check("kernel", "a = 1  \nb = 2")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)kernel\.txt changed.*-b = 2.*\+b = 3"):
        check("kernel", "a = 1\nb = 3\n")


def test_accepting_replaces(tmp_path):
    for text in ("a", "b"):
        Expected(accept=True, folder=tmp_path)("kernel", text)
        Expected(accept=False, folder=tmp_path)("kernel", text)


def test_a_missing_text_fails_but_a_release_without_texts_is_skipped(tmp_path):
    check = Expected(accept=False, folder=tmp_path, version="2.13.0+cpu")
    with pytest.raises(pytest.skip.Exception, match=r"torch-2\.13"):
        check("kernel", "a")
    check.folder.mkdir()
    with pytest.raises(pytest.fail.Exception, match=r"kernel\.txt is missing"):
        check("kernel", "a")


def test_paths_hashes_and_symbols_are_normalised():
    one = "# kernel path: /tmp/a/b.py\nx = s33 + s7 + s33 / 2  # /tmp/tmpab/c.py 'd41d8cd98f00b204e9800998ecf8427e'"
    two = "x = s5 + s90 + s5 / 2  # /var/x/c.py '00000000000000000000000000000000'\n\n"
    assert normalise(one) == normalise(two) == "x = s0 + s1 + s0 / 2  # PATH 'HASH'\n"
    assert normalise("x = s1 + s1") != normalise("x = s1 + s2")
