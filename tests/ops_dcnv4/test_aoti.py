"""Test of the C++ example, which runs an AOTInductor package and the compiled library."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch._inductor.codegen import cpp_wrapper_cpu
from torch.export import Dim

import ops_dcnv4
from flash_internimage.export.aoti import arrays_declared_at_use

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
SOURCE = ROOT / "examples" / "aoti" / "classify.cpp"
CXX = shutil.which("g++")
MEAN, STD = [100.0, 90.5, 80.0], [50.0, 60.5, 70.0]


class Classifier(nn.Module):
    """A classifier of images (N, 3, 6, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.dcn = nn.Linear(3, 32), ops_dcnv4.DCNv4(32, group=2)
        self.head = nn.Linear(32, 4)
        for parameter in self.parameters():  # offsets and modulation start from zero
            nn.init.normal_(parameter, std=0.3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dcn(self.embed(images.permute(0, 2, 3, 1))).mean((1, 2)))


def build_program(folder: Path) -> Path:
    program, libraries = folder / "classify", TORCH / "lib"
    command = [CXX, "-std=c++20", "-O0", SOURCE, "-o", program, f"-I{TORCH / 'include'}"]
    command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([*command, "-ldl"], check=True)
    return program


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or CXX is None, reason="needs Linux and g++")
@torch.no_grad()
def test_a_package_classifies_batches_in_a_program_without_python(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, pixels = Classifier(), torch.randint(256, (3, 6, 8, 3), dtype=torch.uint8)
    images = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    images = images.permute(0, 3, 1, 2).contiguous()
    # Inductor keeps arrays by the id of a freed object, which may be the id of the next one.
    monkeypatch.setattr(cpp_wrapper_cpu, "id", lambda _: 0, raising=False)
    with arrays_declared_at_use():
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},)),
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={
                "aot_inductor.metadata": {"mean": json.dumps(MEAN), "std": json.dumps(STD)},
                "aot_inductor.compile_wrapper_opt_level": "O0",
                "aot_inductor.precompile_headers": False,
                "cpp.vec_isa_ok": False,
                "cpp_cache_precompile_headers": False,
            },
        )
    paths = [tmp_path / f"{i}.ppm" for i in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image.numpy()).save(path)
    program = build_program(tmp_path)
    expected, labels = model(images).softmax(1).max(1)
    for count in (3, 1):
        command = [program, ops_dcnv4.library_path(), package, *paths[:count]]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.findall(r"(\S+): class (\d+), probability (\S+)\n", output)
        assert [Path(path) for path, _, _ in found] == paths[:count]
        assert [int(label) for _, label, _ in found] == labels[:count].tolist()
        probabilities = [float(probability) for _, _, probability in found]
        assert probabilities == pytest.approx(expected[:count].tolist(), rel=1e-4)
