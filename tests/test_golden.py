"""The rewritten code computes what the code before it did: tests/golden.json, see golden.py."""
import json
import os

import pytest

import golden

with open(os.path.join(golden.HERE, "golden.json"), encoding="utf-8") as f:
    WANTED = json.load(f)


@pytest.fixture(scope="module")
def measured():
    return golden.measure()


@pytest.mark.parametrize("part", ["data", "batches"])
def test_data_and_batches_are_equal_to_the_last_bit(measured, part):
    assert measured[part] == WANTED[part]


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
@pytest.mark.parametrize("part", ["vision_model", "projector", "language_model"])
@pytest.mark.parametrize("what,tolerance", [("weights", 1e-5), ("update", 1e-3)])
def test_six_steps_change_the_weights_as_before(measured, stage, part, what, tolerance):
    """In stage 2 the loss is summed in another order than it was: equal up to rounding."""
    got = measured[stage][part][what]
    wanted = WANTED[stage][part][what]
    assert got["norm"] == pytest.approx(wanted["norm"], rel=tolerance)
    allowed = tolerance * wanted["norm"]
    assert got["signed_sum"] == pytest.approx(wanted["signed_sum"], abs=allowed)


def test_a_converted_checkpoint_gives_the_logits_that_the_old_loader_gave(measured):
    got = measured["released_logits"]
    wanted = WANTED["released_logits"]
    assert got["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
    assert got["signed_sum"] == pytest.approx(wanted["signed_sum"], rel=1e-4)
