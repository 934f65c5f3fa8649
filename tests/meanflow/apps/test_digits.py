"""One-step generation works: the main job's figures on real digits, after its fixed number of training steps."""

import json

import pytest

from meanflow.apps.comparison import compare
from meanflow.presets import preset


@pytest.mark.slow
def test_one_step_digits(tmp_path):
    config, flow_matching = preset("digits"), preset("digits-flow-matching")
    assert compare({"meanflow": config, "flow_matching": flow_matching}, tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["classifier_accuracy_real"] > 0.97
    assert report["accuracy"] >= 0.93
    assert report["frechet"] <= 5 * report["frechet_floor"]
    assert report["frechet"] <= report["frechet_flow_matching"] / 5
    assert report["variance_ratio"] >= 0.65
    # flow matching in one step gives class means: always right, never any variety
    assert report["variance_ratio_flow_matching"] < 0.2
