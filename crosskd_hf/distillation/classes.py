"""Which classes teacher and student share, by name."""

from typing import NamedTuple

from transformers import PreTrainedConfig

from ..data.class_names import class_names, listing, match_names


class ClassMap(NamedTuple):
    """Classes that both models know.

    Args:
        teacher, student: Indices of the shared classes in either model, in the student's order.
        unknown: Names of the student's classes that the teacher does not know; they are left out of distillation.
    """

    teacher: list[int]
    student: list[int]
    unknown: list[str]

    def __str__(self) -> str:
        text = f"{len(self.student)} classes shared by name"
        return text + (f"; not distilled, unknown to the teacher: {', '.join(self.unknown)}" if self.unknown else "")


def match_classes(student: PreTrainedConfig, teacher: PreTrainedConfig) -> ClassMap:
    """Match the classes of two models by name: exact names first, then without case and spaces (see `match_names`).

    Raises:
        ValueError: No class name is shared, or one of the student may be several of the teacher.
    """
    names, known = class_names(student), class_names(teacher)
    matches = match_names(names, known)
    if matches.ambiguous:
        raise ValueError(
            f"Classes of the student may be several of the teacher's: {matches.ambiguous}. Set "
            f"`teacher.config.id2label` to the student's spelling."
        )
    shared = [(index, match) for index, match in enumerate(matches.indices) if match >= 0]
    if not shared:
        raise ValueError(
            f"Teacher and student share no class name. Teacher: {listing(known, 5)}. Student: {listing(names, 5)}. "
            f"If the classes are the same under other names, set `teacher.config.id2label` to the student's names."
        )
    return ClassMap(
        teacher=[match for _, match in shared],
        student=[index for index, _ in shared],
        unknown=[name for name, match in zip(names, matches.indices, strict=True) if match < 0],
    )
