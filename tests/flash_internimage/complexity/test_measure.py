"""Tests of the measured complexity against runs on the CPU."""

from itertools import chain

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from flash_internimage.complexity import measure_complexity
from flash_internimage.complexity.tracker import Tracker
from flash_internimage.configs import find_config
from flash_internimage.openmmlab import use_flash_attention
from flash_internimage.openmmlab.cli.config import read_config
from tests.flash_internimage.models import images, nano

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (64, 96)


@pytest.fixture(name="classifier", scope="module")
def measure_classifier():
    return measure_complexity("flash_internimage_nano", SIZE, batch_size=2)


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def allocated(function) -> int:
    """Return the peak of the bytes that PyTorch's allocator has handed out during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_prediction_is_measured_as_on_the_cpu(classifier):
    model, x = nano(0).eval(), images(2, 3, *SIZE)
    tensors = [*model.parameters(), *model.buffers(), x]
    with torch.no_grad(), Tracker(tensors) as tracker:
        model(x)
    assert classifier.inference_memory == tracker.peak_memory
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * classifier.multiply_adds == counter.get_total_flops()
    assert classifier.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        real = nbytes(tensors) + allocated(lambda: model(x))
    assert classifier.inference_memory <= real <= 1.2 * classifier.inference_memory


def test_activations_are_outputs_of_convolutions_and_linear_layers_and_operators(classifier):
    model, x = nano(0), images(2, 3, *SIZE)
    outputs = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda m, i, output: outputs.append(output.numel()))
    for block in chain.from_iterable(level.blocks for level in model.levels):
        # The operator's output is the input of the layer's last projection.
        block.dcn.output_proj.register_forward_hook(lambda m, i, o: outputs.append(i[0].numel()))
    model(x)
    assert classifier.activations == sum(outputs)


def test_training_step_is_measured_as_on_the_cpu(classifier):
    model, x = nano(0).train(), images(2, 3, *SIZE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer, labels = torch.optim.AdamW(model.parameters()), torch.zeros(2, dtype=torch.long)

    def step() -> None:
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    kept = nbytes([*model.parameters(), *model.buffers(), *states(optimizer), x])
    real = kept + allocated(step)
    assert classifier.training_memory <= real <= 1.2 * classifier.training_memory


DENSE = [
    "upernet_flash_internimage_nano_digits_scenes",
    "mask2former_flash_internimage_nano_digits_scenes",
    "mask_rcnn_flash_internimage_nano_fpn_digits_scenes",
    "dino-4scale_flash_internimage_nano_digits_scenes",
]


def run(model: nn.Module, x: torch.Tensor) -> None:
    """Run a detector or segmentor up to the outputs of its heads."""
    info = {"img_shape": SIZE, "ori_shape": SIZE, "pad_shape": SIZE, "batch_input_shape": SIZE}
    samples = [DetDataSample(metainfo=info)]
    if hasattr(model, "encode_decode"):
        model.encode_decode(x, [info])
    elif hasattr(model, "roi_head"):
        corners = torch.rand(1000, 2) * 32
        boxes = torch.cat((corners, corners + 16), dim=1)
        maps = model.extract_feat(x)
        model.rpn_head(maps)
        model.roi_head(maps, [InstanceData(bboxes=boxes)], samples)
    else:
        model(x, samples, mode="tensor")


@pytest.mark.slow
@pytest.mark.usefixtures("restore_scope")
@pytest.mark.parametrize("name", DENSE)
def test_detectors_and_segmentors_cost_the_multiply_adds_of_a_real_run(name):
    measured = measure_complexity(name, SIZE)
    cfg = read_config(find_config(name))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    use_flash_attention(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(model, images(1, 3, *SIZE))
    assert 2 * measured.multiply_adds == counter.get_total_flops()
    assert measured.parameters == sum(p.numel() for p in model.parameters())
    assert measured.inference_memory < measured.training_memory
    assert measured.training_memory > 4 * 4 * measured.parameters


def test_memory_is_freed_with_its_tensors():
    tracker = Tracker()
    with tracker:
        x = torch.ones(1024)
        y = x.view(2, 512)  # shares the memory of x
        z = x + 1
        del z
        y.add_(1)
    assert (tracker.memory, tracker.peak_memory) == (4096, 8192)
    del x, y
    assert tracker.memory == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "flash_internimage_tny"}, "did you mean 'flash_internimage_tiny"),
        ({"model": None}, "model must be the name .* got NoneType"),
        ({"model": "flash_internimage_nano", "size": (0, 64)}, r"size must be .* got \(0, 64\)"),
        ({"model": "flash_internimage_nano", "size": 64}, r"size must be two numbers .* got 64"),
        ({"model": "flash_internimage_nano", "size": (64,)}, r"two numbers .* got \(64,\)"),
        ({"model": "flash_internimage_nano", "size": (64.0, 64)}, r"numbers .* got \(64.0, 64\)"),
        ({"model": "flash_internimage_nano", "size": (10**11, 64)}, "from 1 to 65536"),
        ({"model": "flash_internimage_nano", "batch_size": 10**20}, "at most 65536, got 1"),
        ({"model": "flash_internimage_nano", "batch_size": 0}, "batch_size must be at least 1"),
        ({"model": "flash_internimage_nano", "batch_size": "2"}, "at least 1 .* got '2'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_complexity(**arguments)
