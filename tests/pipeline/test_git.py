from __future__ import annotations

from quantline.pipeline.git import commit_of


def test_outside_git_there_is_no_commit(tmp_path):
    assert commit_of(tmp_path) == (None, False)
