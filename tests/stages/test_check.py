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


def test_a_variant_that_cannot_be_quantized_is_refused_with_its_line(root, tmp_path, monkeypatch, capsys):
    for name in ("conf", "envs", "assets"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    lines = "variants:\n  good: method=rtn\n  narrow: method=awq group_size=256\n"
    (tmp_path / "params.yaml").write_text(f"shared: model=demo\nbaseline: method=float\n{lines}")
    with pytest.raises(UserError, match=r"(?s)params\.yaml: variants\.narrow: .*group_size=256: does not divide"):
        check.check({})
    (tmp_path / "params.yaml").write_text(f"{HEAD}variants:\n  good: method=rtn evaluate.min_tokens=16\n")
    assert check.check({}) == 0
    assert "params.yaml: no fault in float, good" in capsys.readouterr().err
