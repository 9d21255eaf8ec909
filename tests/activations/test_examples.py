"""Calibration data: everything readable is read, everything else is refused line by line."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image

from rgsp_jax.activations import read_examples
from rgsp_jax.activations.examples import check_images, load_image
from rgsp_jax.errors import RefusedError


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refusal(path, **options):
    with pytest.raises(RefusedError) as refused:
        read_examples(path, **options)
    return list(refused.value.problems)


def save_image(path, size=(4, 3), mode="RGB"):
    Image.new(mode, size, 7).save(path)
    return path


def test_json_lines(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"text": "one", "label": 3}, "", {"text": " two "}, {"text": "drei ä"})
    dataset = read_examples(path)
    assert [example.text for example in dataset.examples] == ["one", " two ", "drei ä"]
    assert dataset.name == "d.jsonl" and dataset.has_text and not dataset.has_images
    assert dataset.digest != read_examples(write_lines(tmp_path / "e.jsonl", {"text": "one"})).digest


def test_fields_are_chosen_by_name(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"question": "q", "answer": "a"})
    (example,) = read_examples(path, field="question", pair_field="answer").examples
    assert (example.text, example.pair, example.image) == ("q", "a", None)


def test_text_files_have_a_text_per_line(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two\n")
    assert [example.text for example in read_examples(tmp_path / "d.txt").examples] == ["one", "two"]


def test_every_bad_line_is_named(tmp_path):
    lines = [{"text": "fine"}, "{", [1], {"label": 1}, {"text": 4}, {"text": "  "}]
    problems = refusal(write_lines(tmp_path / "d.jsonl", *lines))
    assert len(problems) == 5
    for line, expected in zip(
        (2, 3, 4, 5, 6), ("JSON", "list", "no field 'text'; there is 'label'", "int", "empty"), strict=True
    ):
        assert any(f"line {line}:" in problem and expected in problem for problem in problems)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.jsonl", b"", "is empty"),
        ("d.txt", b"\n\n", "is empty"),
        ("d.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("d.csv", b"a,b", "unknown kind"),
        ("d.npz", b"no archive", "cannot be read as NumPy"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (problem,) = refusal(tmp_path / name)
    assert message in problem


def test_absent_data_are_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "d.jsonl")[0]
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refusal(tmp_path / "empty")[0]


def test_arrays(tmp_path):
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels)
    assert len(read_examples(tmp_path / "d.npz").examples) == 3
    np.savez(tmp_path / "other.npz", labels=pixels)
    assert "there is labels" in refusal(tmp_path / "other.npz")[0]
    np.savez(tmp_path / "int.npz", images=np.zeros((2, 4, 4), np.int64))
    assert "int64" in refusal(tmp_path / "int.npz")[0]
    np.savez(tmp_path / "nan.npz", pixel_values=np.stack([np.zeros((1, 2, 2)), np.full((1, 2, 2), np.nan)]))
    assert "not finite in examples 1" in refusal(tmp_path / "nan.npz")[0]
    np.savez(tmp_path / "objects.npz", images=np.asarray([{}], object))
    assert "cannot be read" in refusal(tmp_path / "objects.npz")[0]  # a pickle is never loaded


def test_images_of_a_directory_and_of_lines(tmp_path):
    (tmp_path / "deep").mkdir()
    save_image(tmp_path / "b.png")
    save_image(tmp_path / "deep/a.JPG")
    save_image(tmp_path / ".hidden.png")
    (tmp_path / "notes.md").write_text("no image")
    dataset = read_examples(tmp_path)
    assert [example.image.name for example in dataset.examples] == ["b.png", "a.JPG"]
    path = write_lines(tmp_path / "d.jsonl", {"text": "a", "image": "b.png"}, {"text": "b", "image": "deep/a.JPG"})
    assert [example.text for example in read_examples(path).examples] == ["a", "b"]
    alone = write_lines(tmp_path / "e.jsonl", {"image": "b.png"})
    assert read_examples(alone).examples[0].text is None


def test_images_stay_inside_the_data(tmp_path):
    outside = save_image(tmp_path / "secret.png")
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(outside)
    names = ["../secret.png", str(outside), "link.png", "absent.png", ""]
    problems = refusal(write_lines(data / "d.jsonl", *({"text": "x", "image": name} for name in names)))
    assert len(problems) == len(names)
    assert "symbolic link" in refusal(data / "d.jsonl")[2] and "is not in" in problems[3]
    (data / "d.jsonl").unlink()
    assert "symbolic link" in refusal(data)[0]


def test_broken_images_are_named_before_the_model_runs(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    dataset = read_examples(tmp_path)
    with pytest.raises(RefusedError) as refused:
        check_images(dataset.examples)
    assert "b.png" in str(refused.value)
    with pytest.raises(RefusedError, match=r"c\.png"):
        load_image(tmp_path / "c.png")


def test_pillow_is_asked_for(tmp_path, monkeypatch):
    save_image(tmp_path / "a.png")
    dataset = read_examples(tmp_path)
    real = builtins.__import__

    def without_pillow(name, *rest):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(RefusedError, match="pip install Pillow"):
        check_images(dataset.examples)
