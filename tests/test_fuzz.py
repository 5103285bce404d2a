"""Five seconds of what `make chaos` does for minutes, with cases that are the same every time."""

from __future__ import annotations

import pytest
from fuzz_cases import broken_picture, check_picture, check_recipe, overrides, real_files, recipe_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslsr_diffusion.images import read_image

few = settings(
    max_examples=150,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@few
@given(recipe_files, overrides | st.just([]))
def test_any_recipe_is_read_or_refused_in_plain_sentences(tmp_path, data, sets):
    check_recipe(tmp_path, data, sets)


@few
@given(broken_picture())
def test_any_picture_is_read_whole_or_refused_in_one_line(tmp_path, data):
    check_picture(tmp_path, data)


@pytest.mark.parametrize("name", real_files())
def test_the_files_that_are_broken_were_whole(name, tmp_path):
    if name == "float.tif":
        assert not check_picture(tmp_path, real_files()[name])
    else:
        assert check_picture(tmp_path, real_files()[name])
        assert read_image(real_files()[name]).size in ((11, 13), (13, 11))
