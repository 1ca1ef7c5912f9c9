"""Settings without effect are told when they are given, and only then."""

from typing import Any

import pytest
from factories import load, train_tree

from flagscale.runner.config.experiment import Deploy, Runner
from flagscale.runner.config.idle import OF_DEPLOY, OF_RUNNER


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("runner__enable_monitoring", True),
        ("runner__hang_detection_timeout", 60),
        ("runner__deploy", {"use_fs_serve": True}),
        ("auto_tuner", {"space": {"micro_batch_size": [1, 2]}}),
    ],
)
def test_a_setting_without_effect_is_told(key: str, value: Any) -> None:
    (warning,) = load(train_tree(**{f"experiment__{key}": value})).warnings
    assert warning.path.startswith("experiment." + key.replace("__", "."))
    assert "has no effect in this release" in warning.message


def test_what_is_switched_off_or_left_out_is_not() -> None:
    assert load(train_tree()).warnings == ()
    assert load(train_tree(experiment__runner__enable_monitoring=False)).warnings == ()


def test_every_row_is_a_setting() -> None:
    assert set(Runner.model_fields) >= set(OF_RUNNER)
    assert set(Deploy.model_fields) >= set(OF_DEPLOY)
