"""Take a picture of a running page (`flash-internimage app`) that shows the result for an image.

python -m tools.app_screenshot http://127.0.0.1:7860 IMAGE -o docs/images/app.jpg
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tools.browser import open_browser

_SECONDS = 300
_WIDTH = 880


def show_results(window: webdriver.Chrome, address: str, image: Path) -> None:
    """Open a page, upload an image, predict it, and click the pixel in its center."""

    def wait_for_text(name: str) -> None:
        field = window.find_element(By.CSS_SELECTOR, f"#{name} textarea")
        WebDriverWait(window, _SECONDS).until(lambda _: field.get_property("value"))

    def wait_for_picture(name: str) -> list:
        selector = By.CSS_SELECTOR, f"#{name} img"
        return WebDriverWait(window, _SECONDS).until(lambda _: window.find_elements(*selector))

    window.get(address)
    upload = By.CSS_SELECTOR, "#image input[type=file]"
    [field] = WebDriverWait(window, _SECONDS).until(lambda _: window.find_elements(*upload))
    field.send_keys(str(image.resolve()))
    [picture] = wait_for_picture("image")
    window.find_element(By.ID, "predict").click()
    wait_for_text("summary")
    wait_for_picture("prediction")
    ActionChains(window).move_to_element(picture).click().perform()
    wait_for_text("points-summary")
    wait_for_picture("points")


def main(argv: list[str] | None = None) -> int:
    """Save the picture and return the exit code."""
    parser = argparse.ArgumentParser(description="Take a picture of a running page.")
    parser.add_argument("address", help="address of the page")
    parser.add_argument("image", type=Path, help="image to upload")
    parser.add_argument("-o", "--output", type=Path, required=True, help="*.jpg")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, open_browser(Path(folder) / "profile") as window:
        show_results(window, arguments.address, arguments.image)
        height = window.execute_script("return document.documentElement.scrollHeight")
        window.set_window_size(1280, height + 200)
        WebDriverWait(window, 10).until(
            lambda _: window.execute_script("return innerHeight") >= height
        )
        picture = Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")
    picture.thumbnail((_WIDTH, picture.height))
    picture.save(arguments.output, quality=72, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
