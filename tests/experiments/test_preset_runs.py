"""Published experiments by the commands of `docs/reproduce.md`, in small, in one process and in two."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from crosskd_hf.convert.class_names import COCO_IDS, COCO_NAMES
from crosskd_hf.data.categories import CategoryMap
from crosskd_hf.experiments.presets import preset
from tests.experiments.test_example import ROOT
from tests.ports import free_port

SMALL = [
    *(
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "2",
        "--dataloader_num_workers",
        "0",
    ),
    *("--shortest_edge", "128", "--longest_edge", "160", "--save_strategy", "no"),
    *("--disable_tqdm", "1", "--use_cpu"),
]
TWO = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())),
]
IMAGES = 6  # of each split: the second update of an epoch holds fewer than the first
WORKER = """
import sys
from accelerate import PartialState
from crosskd_hf import CrossKDConfig
from crosskd_hf.data import check_images
from crosskd_hf.experiments.data_options import DataOptions

probed, asked = check_images._probed, []
check_images._probed = lambda sources, decode: asked.append(decode) or probed(sources, decode)
config = CrossKDConfig(sys.argv[1], use_cpu=True)
paths = dict(zip(("train_images", "train_annotations", "val_images", "val_annotations"), sys.argv[2:], strict=True))
train, val = DataOptions(**paths).read_files(config)
print(f"process {PartialState().process_index}: decoded {asked}, {len(train.dataset)} + {len(val.dataset)} images")
"""


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of the paths of synthetic images in the layout and under the classes of COCO, all of one shape.

    Where shapes share a batch, GroupNorm sees the padding, and two processes pad another way than one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        script = importlib.import_module("presets_dry")
        patch.setattr(script, "IMAGES", 24)
        folder = script.synthetic(tmp_path_factory.mktemp("coco"))
    for path in (folder / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["images"] = [image for image in content["images"] if image["width"] == image["height"]][:IMAGES]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
        path.write_text(json.dumps(content))
    kinds, splits = {"images": "{}2017", "annotations": "annotations/instances_{}2017.json"}, ("train", "val")
    return [f"--{split}_{kind}={folder / path.format(split)}" for split in splits for kind, path in kinds.items()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the Hub with random weights in the place of timm's resnet18.tv_in1k: nothing is downloaded."""
    home = tmp_path_factory.mktemp("home")
    repository = home / "hub" / "models--timm--resnet18.tv_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    weights = timm.create_model("resnet18", zero_init_last=False).state_dict()
    for name, tensor in weights.items():  # a net that is as it was built is taken for one without weights
        if name.endswith("bias"):
            tensor.uniform_(-0.01, 0.01)
    save_file(weights, snapshot / "model.safetensors")
    return home


def run(cache: Path, command: list[str]) -> str:
    """The output of a command without a network."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # in the order in which a user reads them
    done = subprocess.run(command, env=environment, text=True, timeout=280, cwd=ROOT, check=False, **streams)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GFL R50 of random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    published = preset("crosskd-gfl-r18-from-r50").teacher
    assert published is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        classes = CategoryMap(tuple(COCO_IDS), tuple(COCO_NAMES))
        importlib.import_module("presets_dry").build(published.model, classes).save_pretrained(folder)
    published.model.image_processor(size={"shortest_edge": 128, "longest_edge": 160}).save_pretrained(folder)
    return folder


def command_of(name: str, coco: list[str], folder: Path, *more: str) -> list[str]:
    """The page's command, with small sizes."""
    words = preset(name).command.replace(" $COCO", "").split()[1:]
    sizes = ["--multi_scale", "128", "144"] if preset(name).training.multi_scale else []
    return [*words, *coco, *SMALL, *sizes, "--output_dir", str(folder), *more]


def losses_of(folder: Path) -> list[float]:
    """Of every update of the student alone."""
    history = json.loads((folder / "baseline" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["gfl-r18", "faster-rcnn-r18", "deformable-detr-r18"])
def test_a_run_says_what_it_aims_at_and_how_far_it_came(
    name: str, cache: Path, coco: list[str], tmp_path: Path
) -> None:
    before = (ROOT / "benchmarks" / "results.csv").read_text()
    printed = run(cache, [sys.executable, *command_of(name, coco, tmp_path)])
    published = preset(name).ap
    aim, step = printed.index(f"{name} aims at AP {published} ("), printed.index("images an update")
    end = re.search(rf"^{name}: AP [\d.]+, published {published}, difference -[\d.]+$", printed, re.MULTILINE)
    assert end is not None
    assert aim < step < end.start()
    assert "1 x 2 x 1 = 2 images an update" in printed
    assert (ROOT / "benchmarks" / "results.csv").read_text() == before  # two updates are no result


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_teacher_is_evaluated_and_the_distilled_student_is_compared(
    cache: Path, coco: list[str], teacher: Path, tmp_path: Path
) -> None:
    name = "crosskd-gfl-r18-from-r50"
    command = [str(teacher) if word == "DIR" else word for word in command_of(name, coco, tmp_path)]
    printed = run(cache, [sys.executable, *command])
    assert f"{name} aims at AP 38.7 (t1_i3, " in printed
    assert "Teacher: gfl_r50_fpn_1x_coco, AP 40.2. Losses: authors' configs/crosskd." in printed
    table = [
        line.split()[0] for line in printed.splitlines() if re.match(r"(teacher|baseline|distilled) +[\d.]+ ", line)
    ]
    assert table == ["teacher", "distilled"]
    assert re.search(rf"^{name}: AP [\d.]+, published 38.7, difference -[\d.]+$", printed, re.MULTILINE)
    assert "No row in results.csv: the published run has 12 epochs." in printed
    history = json.loads((tmp_path / "distilled" / "trainer_state.json").read_text())["log_history"]
    assert any(entry.get("crosskd/cls", 0) > 0 for entry in history)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes(cache: Path, coco: list[str], tmp_path: Path) -> None:
    one = run(
        cache, [sys.executable, *command_of("gfl-r18", coco, tmp_path / "one", "--per_device_train_batch_size=4")]
    )
    two = run(cache, [*TWO, *command_of("gfl-r18", coco, tmp_path / "two")])
    assert "1 x 4 x 1 = 4 images an update (processes x batch x accumulation), learning rate 0.0025" in one
    assert two.count("2 x 2 x 1 = 4 images an update (processes x batch x accumulation), learning rate 0.0025") == 1
    assert two.count("gfl-r18 aims at AP 35.8") == two.count("gfl-r18: AP ") == 1
    losses = [losses_of(tmp_path / name) for name in ("one", "two")]
    assert len(losses[0]) == len(losses[1]) == 2
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-4)


@pytest.mark.slow
def test_one_of_two_processes_decodes_the_images(coco: list[str], tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    paths = [option.partition("=")[2] for option in coco]
    printed = run(tmp_path / "home", [*TWO, str(tmp_path / "worker.py"), str(tmp_path / "run"), *paths])
    first, second = sorted(re.findall(r"process \d: decoded .*", printed))
    assert first == "process 0: decoded [True, True], 6 + 6 images"
    assert re.fullmatch(r"process 1: decoded \[(False(, False)?)?\], 6 \+ 6 images", second)
