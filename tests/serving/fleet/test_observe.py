from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import fake_fleet
import httpx
import pytest
import yaml

from quantline.serving.fleet.load import Load, run
from quantline.serving.fleet.observe import alerts, dashboard, metrics, targets, write
from quantline.serving.fleet.spec import Fleet, Variant

TESTS = Path(__file__).with_name("alerts_test.yaml")
NAME = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)", re.MULTILINE)


@pytest.fixture
def promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("Debian's `prometheus` has promtool")
    return found


def test_the_rules_are_sound_and_every_alert_is_raised_by_what_it_is_for_alone(promtool, tmp_path):
    (tmp_path / "alerts.yaml").write_text(alerts())
    shutil.copy(TESTS, tmp_path)
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", TESTS.name]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test_and_says_what_to_do():
    rules = [rule for group in yaml.safe_load(alerts())["groups"] for rule in group["rules"] if "alert" in rule]
    tested = {
        test["alertname"]
        for part in yaml.safe_load(TESTS.read_text())["tests"]
        for test in part["alert_rule_test"]
        if test["exp_alerts"]
    }
    assert tested == {rule["alert"] for rule in rules}
    assert all(rule["annotations"]["remedy"] for rule in rules)


@pytest.mark.toolchain("router")
def test_every_metric_of_router_and_gauge_is_in_a_real_scrape_of_the_targets(tmp_path):
    good = Variant(name="w4", port=1, perplexity_increase=0.02, alarms=0, weight_bytes=4)
    with fake_fleet.up(tmp_path) as running:
        fleet = running.fleet
        variants = [one.model_copy(update=good.model_dump(exclude={"name", "port"})) for one in fleet.variants]
        running.fleet = fleet.model_copy(update={"variants": tuple(variants)})
        running.step()
        fake_fleet.order(running)("w4", "sick")
        run(Load(fleet.url, "low", 10))

        def scraped():
            found = set()
            for target in targets(fleet):
                url = f"http://{target['targets'][0]}{target['labels']['__metrics_path__']}"
                found |= set(NAME.findall(httpx.get(url, trust_env=False).text))
            return found

        from quantline.serving.fleet.child import wait_until

        named = {name for name in metrics() if not name.startswith("vllm:")}
        assert wait_until(lambda: named <= scraped(), 5), named - scraped()
    assert len(named) > 12


def test_what_is_written_can_be_read_by_its_tools(tmp_path):
    fleet = Fleet(
        folder=str(tmp_path / "f"), variants=(Variant(name="w4", port=9001),), precisions={"low": ("w4",)}, admin_port=9000,
        gauge_port=9002,
    )  # fmt: skip
    folder = write(fleet)
    found = json.loads((folder / "targets.json").read_text())
    assert [entry["targets"] for entry in found] == [["127.0.0.1:9000"], ["127.0.0.1:9002"], ["127.0.0.1:9001"]]
    assert found[2]["labels"]["variant"] == "w4"
    panels = json.loads((folder / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len(dashboard()["panels"])
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)


def test_the_expressions_of_the_dashboard_are_sound(promtool, tmp_path):
    rules = [
        {"record": f"panel:{panel['id']}:{line['refId']}", "expr": line["expr"]}
        for panel in dashboard()["panels"]
        for line in panel["targets"]
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        [promtool, "check", "rules", str(tmp_path / "rules.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
