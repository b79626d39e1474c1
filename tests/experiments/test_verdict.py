"""The verdict of `distill`, and what its figures ask for."""

from pathlib import Path

from crosskd_hf.experiments.verdict import Distillation, verdict


def test_a_verdict_knows_the_noise_of_one_seed() -> None:
    assert verdict([5.1]).startswith("Distillation helped: +5.1 AP with one seed")
    assert verdict([-5.1]).startswith("Distillation harmed: -5.1 AP with one seed")
    assert verdict([1.2]).startswith("Undecided: the distilled student is +1.2 AP from the baseline")
    # mean 3, standard deviation 1, t(0.975, 2) = 4.303: 3 +- 2.484
    assert verdict([2.0, 3.0, 4.0]) == "Distillation helped: +3.0 AP, 95 % interval +0.5 to +5.5 over 3 seeds."
    assert verdict([0.0, 1.0, 2.0]).startswith("Undecided: +1.0 AP, 95 % interval -1.5 to +3.5 over 3 seeds")


def test_a_teacher_below_the_baseline_is_told() -> None:
    def made(teacher: float, *baselines: float) -> Distillation:
        students = {f"baseline-{seed}": {"map": value} for seed, value in enumerate(baselines)}
        return Distillation({"teacher": {"map": teacher}, **students}, "Undecided.", (0.0,), Path())

    (told,) = made(0.011, 0.02, 0.029).advice
    assert told.startswith("The teacher's AP 1.1 is not above the baseline's 2.9")
    assert made(0.3, 0.2, 0.25).advice == []
    assert Distillation({"baseline": {"map": 0.1}}, "", (0.0,), Path()).advice == []  # it knows other classes
