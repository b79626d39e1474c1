"""Which classes teacher and student share, by name."""

from typing import NamedTuple

from transformers import PreTrainedConfig


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
    """Match the classes of two models by name, ignoring case and outer spaces.

    Raises:
        ValueError: No class name is shared.
    """
    teacher_index = {normal_name(name): int(index) for index, name in teacher.id2label.items()}
    pairs = [
        (int(index), name, teacher_index.get(normal_name(name))) for index, name in sorted(student.id2label.items())
    ]
    shared = [(index, match) for index, _, match in pairs if match is not None]
    if not shared:
        raise ValueError(
            f"Teacher and student share no class name. Teacher: {_some(teacher)}. Student: {_some(student)}. "
            f"If the classes are the same under other names, set `teacher.config.id2label` to the student's names."
        )
    return ClassMap(
        teacher=[match for _, match in shared],
        student=[index for index, _ in shared],
        unknown=[name for _, name, match in pairs if match is None],
    )


def normal_name(name: str) -> str:
    """What two spellings of one class name have in common."""
    return name.strip().lower()


def _some(config: PreTrainedConfig) -> str:
    names = list(config.id2label.values())
    return f"{len(names)} classes, {', '.join(map(repr, names[:5]))}{', ...' if len(names) > 5 else ''}"
