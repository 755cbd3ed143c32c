import pytest

from lowering.errors import MoEOptionError
from lowering.settings import Settings, read_settings


@pytest.mark.parametrize("name", ["disable", "debug", "batch_invariant"])
@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_each_flag_is_read_from_its_variable(name, value, on):
    environ = {} if value is None else {f"DIFFULEX_{name.upper()}": value}
    assert read_settings(environ) == Settings(**{name: on})


@pytest.mark.parametrize("name", ["DIFFULEX_DISABLE", "DIFFULEX_DEBUG", "DIFFULEX_BATCH_INVARIANT"])
def test_a_value_without_a_meaning_is_an_error_that_names_the_variable(name):
    with pytest.raises(MoEOptionError, match=rf"{name}: expected 0, 1 or nothing, got 'yes'"):
        read_settings({name: "yes"})
