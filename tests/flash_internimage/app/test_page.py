"""The page in a browser, and its server as programs use and misuse it."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from flash_internimage.inference import load_predictor, read_rgb
from tools.browser import open_browser, requested_hosts

from .conftest import CONFIG

pytestmark = pytest.mark.slow
BROWSER = "FLASH_INTERNIMAGE_TEST_BROWSER"  # "none" skips the test that needs one
THRESHOLD = 0.3


def predict(page, image: Path, model: str | None = None) -> list[list[str]]:
    """Return the rows of the table."""
    client = Client(page.address, verbose=False, analytics_enabled=False, download_files=False)
    answer = client.predict(model or page.model, handle_file(image), THRESHOLD, api_name="/predict")
    return answer[2]["data"]


@pytest.fixture(scope="module")
def expected(page) -> list[list[list[str]]]:
    predictor = load_predictor(CONFIG, page.weights)
    results = predictor([read_rgb(path) for path in page.images])
    tables = [
        [
            [name, f"{100 * score:.1f} %"]
            for name, score in zip(result.names, result.scores.tolist(), strict=True)
        ]
        for result in results
    ]
    assert all(tables.count(table) == 1 for table in tables)
    return tables


def test_ten_users_at_once_get_their_own_answers(page, expected):
    with ThreadPoolExecutor(10) as users:
        answers = list(users.map(lambda image: predict(page, image), page.images))
    assert answers == expected


def damaged(folder: Path) -> Path:
    path = folder / "damaged.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def text(folder: Path) -> Path:
    path = folder / "text.png"
    path.write_text("no image")
    return path


def huge(folder: Path) -> Path:
    path = folder / "huge.png"
    Image.new("1", (10_000, 10_000)).save(path)
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged, "cannot read image damaged.png"),
        (text, "cannot read image text.png"),
        (huge, r"huge.png must have at most 40 megapixels, got 100 \(10000 x 10000\)"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(page, tmp_path, write, message):
    with pytest.raises(AppError, match=message):
        predict(page, write(tmp_path))


def test_weights_that_cannot_be_downloaded_are_named(page):
    with pytest.raises(AppError, match=r"127\.0\.0\.1:9/missing\.safetensors"):
        predict(page, page.images[0], page.missing)


def test_only_the_models_of_the_page_can_be_loaded(page):
    with pytest.raises(AppError, match="not in the list of choices"):
        predict(page, page.images[0], f"{CONFIG}={page.weights}")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../../../etc/passwd",
        quote("../../etc/passwd", safe=""),
        "secret.txt",
        "{folder}/secret.txt",
        "{folder}/../secret.txt",
        "{weights}",
        "file:///etc/passwd",
    ],
)
def test_no_file_of_the_machine_is_served(page, path):
    path = path.format(folder=page.folder, weights=page.weights)
    response = httpx.get(f"{page.address}/gradio_api/file={path}", trust_env=False)
    assert response.status_code in (403, 404)
    assert "root:" not in response.text
    assert "not for users" not in response.text


def test_no_file_of_another_host_is_served(page):
    address = f"{page.address}/gradio_api/file=https://example.com/"
    response = httpx.get(address, trust_env=False)
    assert (response.status_code, response.text) == (403, "only files of this page are served")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "null"),
        ("{page.folder}/secret.txt", "null"),
        ("https://example.com/photo.png", "Image must be uploaded, got a URL"),
    ],
)
def test_a_request_can_only_name_an_upload(page, path, message):
    path = path.format(page=page)
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    with httpx.Client(base_url=f"{page.address}/gradio_api", trust_env=False) as client:
        event = client.post("/call/predict", json={"data": [page.model, file, THRESHOLD]}).json()
        answer = client.get(f"/call/predict/{event['event_id']}").text
    assert "event: error" in answer
    assert message in answer
    assert not list(page.uploads.rglob(Path(path).name))


def test_large_files_are_refused(page):
    files = {"files": ("large.png", bytes(21 * 2**20))}
    response = httpx.post(f"{page.address}/gradio_api/upload", files=files, trust_env=False)
    assert response.status_code == 413


def value(window, selector: str) -> str:
    return window.find_element(By.CSS_SELECTOR, selector).get_property("value")


def test_a_user_sees_predictions_sampling_points_and_errors(page, expected, tmp_path):
    if os.environ.get(BROWSER) == "none":
        pytest.skip(f"{BROWSER}=none")
    with open_browser(tmp_path / "profile") as window:
        # Elements are missing for a moment, or replaced.
        wait = WebDriverWait(
            window, 60, ignored_exceptions=[NoSuchElementException, StaleElementReferenceException]
        )
        window.get(page.address)
        upload = (By.CSS_SELECTOR, "#image input[type=file]")
        wait.until(lambda _: window.find_elements(*upload))
        window.find_element(*upload).send_keys(str(page.images[3]))
        [image] = wait.until(lambda _: window.find_elements(By.CSS_SELECTOR, "#image img"))
        window.find_element(By.ID, "predict").click()
        best = ": ".join(expected[3][0])
        wait.until(lambda _: value(window, "#summary textarea") == best)
        picture = wait.until(lambda _: window.find_element(By.CSS_SELECTOR, "#prediction img"))
        wait.until(lambda _: picture.get_property("naturalWidth") >= 640)

        # The image has 48 x 40 pixels, and its center is in the middle of the element.
        ActionChains(window).move_to_element(image).click().perform()
        wait.until(lambda _: value(window, "#points-summary textarea"))
        assert "pixel (24, 20)" in value(window, "#points-summary textarea")
        assert (value(window, "#x input"), value(window, "#y input")) == ("24", "20")
        wait.until(lambda _: window.find_elements(By.CSS_SELECTOR, "#points img"))

        window.find_element(By.CSS_SELECTOR, '#image button[aria-label="Remove Image"]').click()
        wait.until(lambda _: window.find_elements(*upload))
        window.find_element(*upload).send_keys(str(text(tmp_path)))
        wait.until(lambda _: window.find_elements(By.CSS_SELECTOR, "#image img"))
        window.find_element(By.ID, "predict").click()
        shown = (By.CSS_SELECTOR, "[data-testid=toast-body]")  # invisible at first
        wait.until(lambda _: "cannot read image text.png" in window.find_element(*shown).text)
        assert requested_hosts(window) == {page.address.removeprefix("http://")}
