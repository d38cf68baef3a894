"""Wrong arguments of `flash-internimage app` are found before a page is built."""

import socket

import pytest

from flash_internimage.app.models import Source
from flash_internimage.cli import app
from flash_internimage.cli.app import main


@pytest.fixture
def used_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--host", "nowhere.invalid"], "--host must be an address of this machine, got nowhere"),
        (["--host", "192.0.2.1"], "--host must be an address of this machine, got 192.0.2.1"),
        (["--max-upload", "0"], "--max-upload must be at least 1, got 0"),
        (["=best.pth"], "MODEL must be NAME or CONFIG=CHECKPOINT, got =best.pth"),
        (["my_config.py="], "MODEL must be NAME or CONFIG=CHECKPOINT, got my_config.py="),
        (
            ["mask2former_internimage"],
            "did you mean 'mask2former_flash_internimage_t_512_160k_ade20k' or "
            "'mask2former_flash_internimage_s_640_160k_ade20k'?",
        ),
        (["upernet"], "model must be a name of the zoo or of timm, or a config, got 'upernet'"),
        (["flash_internimage_nano_digits=no.pth"], "checkpoint not found: no.pth"),
        (["no_config.py=https://host/best.pth"], "no_config.py"),
        (["flash_internimage_tiny.in1k"] * 2, "got 'flash_internimage_tiny.in1k' twice"),
    ],
)
def test_wrong_arguments(caplog, arguments, message):
    assert main([*arguments, "--port", "0"] if "--port" not in arguments else arguments) == 2
    [record] = caplog.records
    assert message in record.getMessage()


def test_released_weights_may_be_the_checkpoint_of_a_config(monkeypatch):
    chosen = []
    monkeypatch.setattr(app, "Models", lambda sources, *_: chosen.extend(sources) or 1 / 0)
    config, weights = "flash_internimage_tiny_in1k_224", "flash_internimage_tiny.in1k"
    with pytest.raises(ZeroDivisionError):
        main([f"{config}={weights}", "--port", "0"])
    assert chosen == [Source(config, weights)]


def test_a_port_in_use_is_named(caplog, used_port):
    assert main(["--port", str(used_port)]) == 2
    [record] = caplog.records
    assert f"--port must be free, got {used_port} on 127.0.0.1: " in record.getMessage()
