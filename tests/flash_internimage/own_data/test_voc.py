"""Tests of reading PASCAL VOC."""

import numpy as np
import pytest
from PIL import Image

from .datasets import HEIGHT, WIDTH, to_coco, to_label_maps, write_image, write_text

SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def xml(*objects: str, size: str = SIZE) -> str:
    return f"<annotation><filename>x.jpg</filename>{size}{''.join(objects)}</annotation>"


def an_object(name: str, *box: float, more: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    bounds = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{more}<bndbox>{bounds}</bndbox></object>"


@pytest.fixture
def root(tmp_path):
    """Return a devkit with the images 1 and 2 for training, 3 for validation, and 4."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for i in range(1, 5):
        write_image(root / f"JPEGImages/{i}.jpg", i)
        write_text(root / f"Annotations/{i}.xml", xml(an_object("dog", 1, 1, 10, 10)))
    write_text(root / "ImageSets/Main/train.txt", "1\n2\n")
    write_text(root / "ImageSets/Main/val.txt", "3\n")
    return root


def test_pixels_are_counted_from_1_and_the_last_one_belongs_to_the_box(root, tmp_path):
    write_text(root / "Annotations/1.xml", xml(an_object("dog", 3, 5, 12, 24)))
    files, _ = to_coco("voc", tmp_path / "VOCdevkit", tmp_path / "coco")
    # Columns 3 to 12 of 1, 2, ... are 2 to 11 of 0, 1, ...: 10 columns and 20 rows.
    assert files["train"]["annotations"][0] == {
        "id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 200.0,
        "bbox": [2.0, 4.0, 10.0, 20.0],
    }  # fmt: skip
    assert files["train"]["images"][0] == {
        "id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH,
    }  # fmt: skip
    assert files["train"]["categories"] == [{"id": 1, "name": "dog"}]
    assert (tmp_path / "coco/train/1.jpg").read_bytes() == (root / "JPEGImages/1.jpg").read_bytes()


def test_splits_are_kept_and_images_in_none_are_counted(root, tmp_path):
    write_text(root / "ImageSets/Main/train.txt", "1 \n2  1\n9\n")
    files, result = to_coco("voc", root, tmp_path / "coco")
    names = {split: [i["file_name"] for i in f["images"]] for split, f in files.items()}
    assert names == {"train": ["1.jpg", "2.jpg"], "val": ["3.jpg"]}
    assert result.losses.counts == {
        "images of a split that are missing or left out": 1,
        "images in no split left out": 1,
    }


@pytest.mark.parametrize(
    ("difficult", "crowds", "loss"),
    [
        ("crowd", [0, 1], "difficult objects made crowds (iscrowd=1)"),
        ("keep", [0, 0], None),
        ("drop", [0], "difficult objects left out"),
    ],
)
def test_difficult_objects(root, tmp_path, difficult, crowds, loss):
    hard = an_object("cat", 1, 1, 9, 9, more="<difficult>1</difficult>")
    write_text(root / "Annotations/3.xml", xml(an_object("dog", 1, 1, 9, 9), hard))
    files, result = to_coco("voc", root, tmp_path / "coco", difficult=difficult)
    assert [a["iscrowd"] for a in files["val"]["annotations"]] == crowds
    assert result.losses.counts.get(loss) == (1 if loss else None)


def test_polygons_and_rotated_boxes_become_outlines(root, tmp_path):
    points = zip(["x1", "y1", "x2", "y2", "x3", "y3"], (1, 1, 11, 1, 1, 21), strict=True)
    polygon = "".join(f"<{tag}>{value}</{tag}>" for tag, value in points)
    triangle = an_object("dog", 1, 1, 10, 20, more=f"<polygon>{polygon}</polygon>")
    angle = "<cx>21</cx><cy>16</cy><w>20</w><h>10</h><angle>1.5707963267948966</angle>"
    rotated = f"<object><name>dog</name><robndbox>{angle}</robndbox></object>"
    write_text(root / "Annotations/3.xml", xml(triangle, rotated))
    files, result = to_coco("voc", root, tmp_path / "coco")
    first, second = files["val"]["annotations"]
    assert first["segmentation"] == [[0.0, 0.0, 10.0, 0.0, 0.0, 20.0]]
    assert first["area"] == pytest.approx(100, abs=8)  # 10 * 20 / 2, as pixels
    assert second["bbox"] == [
        15.0,
        5.0,
        10.0,
        20.0,
    ]  # 20 x 10 around (20, 15), turned by 90 degrees
    assert second["area"] == 200.0
    assert result.losses.counts["rotated boxes turned into polygons"] == 1


def test_what_cannot_be_converted_is_counted_and_named(root, tmp_path):
    parts = "<part><name>head</name></part>"
    objects = [
        an_object("dog", 30, 20, 60, 30, more=parts),  # 20 columns beyond the image
        an_object("dog", 100, 100, 120, 120),
        an_object("dog", 5, 5, "x", 9),
        an_object("dog", 9, 9, 4, 4),
        "<object><name>dog</name></object>",
        an_object("", 1, 1, 5, 5),
        an_object("bird", 1, 1, 5, 5),
    ]
    write_text(root / "Annotations/3.xml", xml(*objects))
    write_text(root / "Annotations/2.xml", "<annotation><object>")
    write_text(root / "Annotations/1.xml", xml(size=SIZE.replace(str(HEIGHT), "31")))
    write_text(root / "Annotations/7.xml", xml())
    write_image(root / "JPEGImages/8.jpg")
    write_text(root / "JPEGImages/4.jpg", "no image")
    files, result = to_coco("voc", root, tmp_path / "coco", classes=["dog"])
    assert [a["bbox"] for a in files["val"]["annotations"]] == [
        [29.0, 19.0, 11.0, 11.0], [4.0, 4.0, 4.0, 4.0],
    ]  # fmt: skip
    assert result.losses.counts == {
        "annotation files without an image": 1,
        "images without an annotation file left out": 1,
        "images of another size than annotated, whose own size is taken": 1,
        "malformed annotation files left out, with their images": 1,
        "parts of objects left out": 1,
        "malformed objects left out": 3,
        "unreadable images left out": 1,
        "images of a split that are missing or left out": 1,
        "boxes clipped to their image": 1,
        "objects outside of their image left out": 1,
        "boxes with corners in the wrong order, which were swapped": 1,
        "objects of unknown classes left out": 1,
    }
    assert result.losses.first["annotation files without an image"].endswith("7.xml")
    assert "xmax" not in result.losses.first["malformed objects left out"]
    assert result.losses.first["malformed objects left out"].startswith(
        f"{root / 'Annotations/3.xml'}, object 3: "
    )


def test_external_entities_are_not_read(root, tmp_path):
    evil = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    write_text(root / "Annotations/3.xml", evil + xml(an_object("&x;", 1, 1, 5, 5)))
    files, result = to_coco("voc", root, tmp_path / "coco")
    assert "val" not in files
    assert result.losses.counts["malformed annotation files left out, with their images"] == 1


def test_roboflow_has_a_folder_for_each_split(tmp_path):
    for split, name in (("train", "a"), ("valid", "b")):
        write_image(tmp_path / f"in/{split}/{name}.jpg")
        write_text(tmp_path / f"in/{split}/{name}.xml", xml(an_object("dog", 1, 1, 4, 4)))
    files, result = to_coco("voc", tmp_path / "in", tmp_path / "coco")
    assert sorted(files) == ["train", "val"]
    assert not result.losses.counts


def test_segmentation_class_becomes_label_maps(root, tmp_path):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, :10], labels[:, 10:12] = 12, 255
    (root / "SegmentationClass").mkdir()
    for i in (1, 3):
        palette = Image.fromarray(labels)
        palette.putpalette([i % 256 for i in range(768)])
        palette.save(root / f"SegmentationClass/{i}.png")
    write_text(root / "ImageSets/Segmentation/train.txt", "1\n")
    write_text(root / "ImageSets/Segmentation/val.txt", "3\n")
    maps, result = to_label_maps("voc", root, tmp_path / "maps")
    assert sorted(maps) == ["train/1", "val/3"]
    assert (maps["train/1"] == labels).all()
    assert result.classes[12] == "dog"
    assert (tmp_path / "maps/classes.txt").read_text().split()[12] == "dog"
    assert result.losses.counts == {"images without a label map left out": 2}


def test_colored_label_maps_follow_labelmap_txt(root, tmp_path):
    colors = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colors[:5], colors[5:7], colors[7] = (250, 50, 83), (224, 224, 192), (1, 2, 3)
    (root / "SegmentationClass").mkdir()
    Image.fromarray(colors).save(root / "SegmentationClass/1.png")
    write_text(
        root / "labelmap.txt",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nleaf:250,50,83::\n",
    )
    maps, result = to_label_maps("voc", root, tmp_path / "maps")
    (labels,) = maps.values()
    assert result.classes == ["background", "leaf"]
    assert [labels[0, 0], labels[6, 0], labels[7, 0], labels[8, 0]] == [1, 255, 255, 0]
    assert result.losses.counts["pixels of unknown colors made ignored pixels"] == WIDTH


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("leaf:250,50", "must have lines such as cat:64,0,0::, got 'leaf:250,50'"),
        ("leaf:250,50,256::", "must have lines such as cat:64,0,0::"),
        ("leaf:red::", "must have lines such as cat:64,0,0::"),
        ("leaf:0,0,0::", "must have a color for each class, got 'leaf:0,0,0::' again"),
    ],
)
def test_malformed_lines_of_labelmap_txt_are_an_error(root, tmp_path, line, message):
    (root / "SegmentationClass").mkdir()
    write_text(root / "labelmap.txt", f"background:0,0,0::\n{line}\n")
    with pytest.raises(ValueError, match=message):
        to_label_maps("voc", root, tmp_path / "maps")


def test_label_maps_without_names_take_those_given_and_ignore_others(root, tmp_path):
    labels = np.repeat(np.array([0, 1, 7], np.uint8), 10)[:, None].repeat(WIDTH, 1)
    (root / "SegmentationClass").mkdir()
    Image.fromarray(labels).save(root / "SegmentationClass/1.png")
    maps, result = to_label_maps("voc", root, tmp_path / "maps", classes=["soil", "leaf"])
    (written,) = maps.values()
    assert result.classes == ["soil", "leaf"]
    assert np.unique(written).tolist() == [0, 1, 255]
    assert result.losses.counts["pixels of unknown classes made ignored pixels"] == 10 * WIDTH
    write_text(root / "labelmap.txt", "leaf:0,0,0::\n")
    with pytest.raises(ValueError, match=r"--classes must not be used with .*labelmap\.txt"):
        to_label_maps("voc", root, tmp_path / "again", classes=["soil", "leaf"])


def test_a_folder_without_annotations_is_an_error(tmp_path):
    write_image(tmp_path / "in/1.jpg")
    with pytest.raises(FileNotFoundError, match="in must contain the folder Annotations or XML"):
        to_coco("voc", tmp_path / "in", tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


def test_16_bit_label_maps_do_not_wrap_around(root, tmp_path):
    labels = np.ones((HEIGHT, WIDTH), np.uint16)
    labels[:3] = 256
    (root / "SegmentationClass").mkdir()
    Image.fromarray(labels).save(root / "SegmentationClass/1.png")
    maps, result = to_label_maps("voc", root, tmp_path / "maps")
    (written,) = maps.values()
    assert (written[:3] == 255).all()
    assert (written[3:] == 1).all()
    assert result.losses.counts["pixels of unknown classes made ignored pixels"] == 3 * WIDTH


@pytest.mark.parametrize("encoding", ["unknown", "utf-7"])
def test_files_in_other_encodings_are_malformed(root, tmp_path, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>{xml(an_object("dog", 1, 1, 10, 10))}'
    write_text(root / "Annotations/1.xml", text)
    _, result = to_coco("voc", root, tmp_path / "coco")
    assert result.losses.counts["malformed annotation files left out, with their images"] == 1


def test_lists_of_windows_and_empty_lists(root, tmp_path):
    folder = root / "ImageSets/Main"
    (folder / "train.txt").write_text("1\r\n2\r\n", "utf-8-sig", newline="")
    write_text(folder / "val.txt", "\n")
    files, result = to_coco("voc", root, tmp_path / "coco")
    assert [image["file_name"] for image in files["train"]["images"]] == ["1.jpg", "2.jpg"]
    assert result.losses.counts == {"splits without images": 1, "images in no split left out": 2}


def test_other_xml_files_are_malformed(root, tmp_path):
    write_text(root / "Annotations/1.xml", "<svg><object/></svg>")
    _, result = to_coco("voc", root, tmp_path / "coco")
    first = result.losses.first["malformed annotation files left out, with their images"]
    assert first.endswith("1.xml: the root must be annotation, got svg")


def test_images_of_label_maps_that_differ_only_in_their_suffix_are_counted(root, tmp_path):
    (root / "SegmentationClass").mkdir()
    Image.new("L", (WIDTH, HEIGHT)).save(root / "SegmentationClass/1.png")
    write_image(root / "JPEGImages/1.png")
    _, result = to_label_maps("voc", root, tmp_path / "maps")
    assert result.losses.counts["images that differ only in their suffix left out"] == 1


def test_instance_masks_are_counted(root, tmp_path):
    write_image(root / "SegmentationObject/1.png")
    _, result = to_coco("voc", root, tmp_path / "coco")
    assert result.losses.counts["instance masks in SegmentationObject left out"] == 1


def test_folders_may_have_the_names_of_other_datasets(root, tmp_path):
    (root / "Annotations").rename(root / "annotations")
    (root / "JPEGImages").rename(root / "images")
    files, _ = to_coco("voc", tmp_path / "VOCdevkit", tmp_path / "coco")
    assert [image["file_name"] for image in files["train"]["images"]] == ["1.jpg", "2.jpg"]
    assert (tmp_path / "coco/train/1.jpg").is_file()
