from __future__ import annotations

import pytest

from sslsr_diffusion.errors import UserError
from sslsr_diffusion.evaluation.results import Key, ResultStore

KEY = Key("a", "b", "psnr", "RGB")


def test_values_survive_and_depend_on_every_part_of_the_key(tmp_path):
    store = ResultStore(tmp_path / "out" / "results.jsonl")
    store.put(KEY, float("inf"), 0.25)
    store.close()
    again = ResultStore(tmp_path / "out" / "results.jsonl")
    assert KEY in again
    assert (again.value(KEY), again.seconds(KEY)) == (float("inf"), 0.25)
    assert all(KEY._replace(**{name: "x"}) not in again for name in Key._fields)
    again.close()


def test_a_line_cut_short_by_an_interruption_costs_only_that_line(tmp_path):
    path = tmp_path / "results.jsonl"
    store = ResultStore(path)
    store.put(KEY, 1.0, 0)
    store.put(KEY._replace(metric="ssim"), 2.0, 0)
    store.close()
    path.write_bytes(path.read_bytes()[:-9])
    again = ResultStore(path)
    assert KEY in again
    assert KEY._replace(metric="ssim") not in again
    again.put(KEY._replace(metric="ssim"), 3.0, 0)
    again.close()
    assert ResultStore(path).value(KEY._replace(metric="ssim")) == 3.0


def test_an_output_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --output"):
        ResultStore(tmp_path / "file" / "results.jsonl")
