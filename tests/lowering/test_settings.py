import pytest

from lowering.errors import MoEOptionError
from lowering.settings import Settings, read_settings


@pytest.mark.parametrize(("value", "disable"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_disable_is_read(value, disable):
    environ = {} if value is None else {"DIFFULEX_DISABLE": value}
    assert read_settings(environ) == Settings(disable=disable)


def test_a_value_without_a_meaning_is_an_error_that_names_the_variable():
    with pytest.raises(MoEOptionError, match=r"DIFFULEX_DISABLE: expected 0, 1 or nothing, got 'yes'"):
        read_settings({"DIFFULEX_DISABLE": "yes"})
