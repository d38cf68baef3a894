from zipfile import ZipFile

import pytest

from tools import build_wheels, check_wheels
from tools.check_wheels import Result
from tools.link_cuda_toolkit import link_toolkit


def test_pytorchs_libraries_stay_outside_of_the_wheel():
    command = build_wheels.read_settings("linux")["repair-wheel-command"]
    for library in ("libtorch*.so", "libc10*.so", "libcudart.so.*"):
        assert f"--exclude '{library}'" in command
    assert "libgomp" not in command


def test_settings_of_a_platform_take_precedence():
    linux, windows = map(build_wheels.read_settings, ("linux", "windows"))
    assert linux["build"] == windows["build"]
    assert linux["test-command"] != windows["test-command"]
    assert "repair-wheel-command" not in windows


def test_repair_runs_the_command_of_the_platform(tmp_path):
    wheel, dist = tmp_path / "a.whl", tmp_path / "dist"
    wheel.write_bytes(b"wheel")
    dist.mkdir()
    build_wheels.repair_wheel(wheel, dist, "cp {wheel} '{dest_dir}/repaired.whl'")
    build_wheels.repair_wheel(wheel, dist, "")
    assert {file.name for file in dist.iterdir()} == {"a.whl", "repaired.whl"}


def test_one_wheel_of_each_package_is_found(tmp_path):
    operators = tmp_path / "ops_dcnv4-1.0-cp311-abi3-linux_x86_64.whl"
    with ZipFile(operators, "w"):
        pass
    with pytest.raises(FileNotFoundError, match="one wheel of flash_internimage, got 0"):
        check_wheels.find_wheels(tmp_path)
    package = tmp_path / "flash_internimage-1.0-py3-none-any.whl"
    package.touch()
    assert check_wheels.find_wheels(tmp_path) == [operators, package]
    (tmp_path / "ops_dcnv4-1.1-cp311-abi3-linux_x86_64.whl").touch()
    with pytest.raises(FileNotFoundError, match="one wheel of ops_dcnv4, got 2"):
        check_wheels.find_wheels(tmp_path)


def test_only_torch_has_another_version():
    pinned, other = map(set, (check_wheels.read_pins(None), check_wheels.read_pins("2.11.0")))
    assert other - pinned == {"torch==2.11.0"}
    assert {line.partition("==")[0] for line in pinned - other} == {"torch", "torchvision"}


def test_extras_are_installed_with_an_mmcv_that_is_not_cached(tmp_path):
    wheels, pins = [tmp_path / "ops.whl", tmp_path / "package.whl"], tmp_path / "pins"
    mmcv, installation, _ = check_wheels.install_steps(
        ["pip"], wheels, ["train", "openmmlab"], pins
    )
    assert {"--no-cache-dir", "--no-deps"} < set(mmcv[1])
    assert mmcv[1][-1].startswith("onedl-mmcv==")
    assert installation[1][-2:] == [str(wheels[0]), f"{wheels[1]}[train,openmmlab]"]
    assert len(check_wheels.install_steps(["pip"], wheels, [], pins)) == 2


@pytest.mark.skipif(not (check_wheels.ROOT / ".git").exists(), reason="git lists the files")
def test_the_copied_tests_come_without_the_packages(tmp_path):
    check_wheels.copy_tests(tmp_path)
    assert (tmp_path / "tests" / "ops_dcnv4" / "test_ops.py").exists()
    assert (tmp_path / "ops_dcnv4" / "csrc" / "library.cpp").exists()
    assert not (tmp_path / "flash_internimage").exists()
    assert not (tmp_path / "flash_internimage_cli.py").exists()
    assert not (tmp_path / "ops_dcnv4" / "ops_dcnv4").exists()


def test_missing_wheels_are_reported_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_wheels", "--dist", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        check_wheels.main()
    assert exit_info.value.code == 2
    assert "one wheel of ops_dcnv4, got 0; run make wheel" in capsys.readouterr().err


def test_the_table_shows_what_failed():
    results = [
        Result("2.11.0", "3.11.7", "0123456789ab", passed=9, seconds=60.2),
        Result("2.12.0", "3.11.7", problem="importing failed"),
    ]
    assert check_wheels.format_table(results).splitlines() == [
        "torch   Python  library       passed  failed  skipped  seconds  result",
        "2.11.0  3.11.7  0123456789ab  9       0       0        60       ok",
        "2.12.0  3.11.7  -             0       0       0        0        importing failed",
    ]


def test_a_toolkit_installed_by_pip_gets_the_names_that_compilers_expect(tmp_path):
    toolkit, folder = tmp_path / "cu13", tmp_path / "cuda"
    (toolkit / "lib").mkdir(parents=True)
    (toolkit / "lib" / "libcudart.so.13").touch()
    with pytest.raises(FileNotFoundError, match="nvcc does not exist: install cuda-toolkit"):
        link_toolkit(toolkit, folder)
    (toolkit / "bin").mkdir()
    (toolkit / "bin" / "nvcc").touch()
    for _ in range(2):
        link_toolkit(toolkit, folder)
        assert (folder / "bin" / "nvcc").exists()
        assert (folder / "lib64" / "libcudart.so").resolve().name == "libcudart.so.13"
