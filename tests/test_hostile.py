"""A sample of the hostile commands and damaged files of tests/hostile; `make faults` tries all of them."""

import pytest

from dropkey.config import schema
from hostile import commands, damages, judge, stub

EVERY_COMMAND, EVERY_DAMAGE = 60, 40  # one of so many is tried here


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return stub.world(tmp_path_factory.mktemp("hostile") / "world")


def failures(cases: list, world, place) -> dict[str, list[str]]:
    found = {str(case): stub.tried(case, world, place / "copy") for case in cases}
    return {case: faults for case, faults in found.items() if faults}


def test_a_hostile_command_ends_in_a_line_that_names_the_key(world, tmp_path):
    cases = [case for case in commands.all_cases(world.run, "image.png", "tiny.yaml") if not case.real]
    assert not failures(cases[::EVERY_COMMAND], world, tmp_path)


def test_a_damaged_file_ends_in_a_line_and_nothing_else_is_lost(world, tmp_path):
    assert not failures(list(damages.all_cases(world))[::EVERY_DAMAGE], world, tmp_path)


def test_every_key_that_is_a_number_has_a_range():
    ranged = " ".join(keys for keys, *_ in schema.VALUES).split()
    numbers = [
        key
        for kind in (schema.TrainConfig, schema.EvalConfig)
        for key, hint in commands.keys_of(kind)
        if commands.values_of(hint) is commands.NUMBERS and key not in ("regularizer.window", "data.split_seed")
    ]
    assert not set(numbers) - set(ranged)


@pytest.mark.parametrize(
    "ended, fault",
    {
        judge.Ended(1, "", "Traceback (most recent call last):\nKeyError: 'x'\n", 0.1): "traceback",
        judge.Ended(0, "", "", 0.1): "taken",
        judge.Ended(2, "", "", 0.1): "without a word",
        judge.Ended(2, "", "error: something\n", 0.1): "seed is not named",
        judge.Ended(2, "", "error: seed\n" * 4, 0.1): "4 lines",
        judge.Ended(2, "", "error: seed=x must be a number\n", 2.5): "until the refusal",
        judge.Ended(1, "", "error: seed\n", 0.1): "exit code 1",
    }.items(),
)
def test_the_judge_sees_each_fault(ended, fault):
    case = judge.Case("", "train", ("seed=x",), "seed", refused=True)
    assert fault in judge.faults(case, ended)[0]


def test_the_judge_is_content_with_a_line_that_names_the_key():
    case = judge.Case("", "train", ("seed=x",), "seed", refused=True)
    assert not judge.faults(case, judge.Ended(2, "", "error: seed=x must be a number\n", 0.1))


def test_a_lost_file_is_seen(world, tmp_path):
    case = next(damages.all_cases(world))
    before = damages.damage(case, world, tmp_path / "copy", 0)
    assert not damages.lost(case, before, tmp_path / "copy")
    (tmp_path / "copy" / world.run / "checkpoints" / "last.pt").unlink()
    assert damages.lost(case, before, tmp_path / "copy") == ["lost last.pt"]
