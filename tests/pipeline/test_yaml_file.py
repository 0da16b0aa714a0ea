from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from quantline.pipeline.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "is not valid YAML"),
        (b"a: !!timestamp x", "is not valid YAML"),
        (b"a: !!int ''", "is not valid YAML"),
        (b"a: 2001-13-45", "is not valid YAML"),
        (b"a: " + b"[" * 5000, "is not valid YAML"),
        (b"a: " + b"9" * 5000, "is not valid YAML"),
        (b"a: !!python/object:os.system x", "is not valid YAML"),
        (b"a: 1\nb: 2\na: 3\n", "a is given twice, in line 1 and in line 3"),
        (b"b:\n  a: 1\n  a: 1\n", "a is given twice, in line 2 and in line 3"),
        (b"a: \xff", "x.yaml is not UTF-8 (byte 3)"),
    ],
)
def test_what_is_no_yaml_is_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "x.yaml", "it is needed")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_says_what_it_is_for(tmp_path):
    with pytest.raises(UserError, match=r"x\.yaml: No such file or directory; it is needed"):
        read_yaml(tmp_path / "x.yaml", "it is needed")


def test_anchors_merged_keys_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("\ufeffa: &a {x: 1}\nb: {<<: *a, y: 2}\n", encoding="utf-8")
    assert read_yaml(tmp_path / "x.yaml", "") == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
