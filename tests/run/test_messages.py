"""Errors as one line of a message."""

from flashdmd_ray.run.messages import one_line, typed_line


def test_a_long_error_keeps_its_beginning_and_its_end():
    line = one_line(OSError("File name too long:\n/" + "x" * 1000 + "/weights.safetensors"))
    assert line.startswith("File name too long: /xxx")
    assert line.endswith("xxx/weights.safetensors")
    assert len(line) < 310
    assert "\n" not in line


def test_an_error_without_text_is_named_by_its_type():
    assert one_line(KeyError()) == typed_line(KeyError()) == "KeyError"
