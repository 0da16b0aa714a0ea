from __future__ import annotations

import pytest

from quantline.core.errors import UserError
from stages import check

HEAD = "shared: model=demo\nbaseline: method=float\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("variants: [\n", "params.yaml is not valid YAML"),
        ("", "needs `variants:`, a mapping of names to overrides"),
        ("\x00\x01garbage", "params.yaml is not valid YAML"),
        (HEAD, "needs `variants:`"),
        (f"{HEAD}variants: nothing\n", "needs `variants:`"),
        (f"{HEAD}variants:\n  - a\n", "needs `variants:`"),
        (f"{HEAD}variants:\n  a.b: method=rtn\n", "variant='a.b': a variant's name takes letters"),
        (
            f"{HEAD}variants:\n  a: {{method: rtn}}\n",
            "variants.a is {'method': 'rtn'}; give overrides as one line of text",
        ),
        (f'{HEAD}variants:\n  a: "method=rtn \'"\n', "No closing quotation; quote it as in a shell"),
        (f"{HEAD}variants:\n  float: method=rtn\n", "a variant cannot be called float"),
    ],
)
def test_nonsense_in_params_is_told_in_one_sentence(tmp_path, monkeypatch, text, words):
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(UserError) as caught:
        check.check({})
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_params_are_an_error_and_good_ones_none(tmp_path, monkeypatch, root):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"params\.yaml: No such file"):
        check.check({})
    monkeypatch.setattr(check, "ROOT", root)
    assert check.check({}) == 0
