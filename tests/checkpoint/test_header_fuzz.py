"""Whatever bytes a safetensors file or index holds, opening it succeeds or is refused; nothing else happens."""

import json

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from checkpoint.builders import raw_file, same_bytes, sample_tensors
from rgsp_jax.checkpoint import DTYPES, open_checkpoint, write_safetensors
from rgsp_jax.errors import RefusedError

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
COUNTS = st.integers(-2, 40) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 1.5, True, None])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3", "C64", "f32", ""]) | JSON,
        "shape": st.lists(COUNTS, max_size=4) | JSON,
        "data_offsets": st.lists(COUNTS, min_size=2, max_size=2) | JSON,
        "other": JSON,
    },
)


def open_and_read(path, size):
    """Read every tensor of a file if it opens; every read must stay inside the file."""
    try:
        checkpoint = open_checkpoint(path)
    except RefusedError as error:
        assert error.problems and all(error.problems)
        return None
    total = 0
    for name, spec in checkpoint.specs.items():
        total += spec.nbytes
        try:
            assert checkpoint.read(name).nbytes == spec.nbytes
        except RefusedError as error:
            assert "booleans" in str(error)
    assert total <= size
    return checkpoint


@SETTINGS
@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=b"\x02" + bytes(7) + b"{}")
def test_random_bytes(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    open_and_read(path, len(content))


@SETTINGS
@given(
    header=st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRY | JSON, max_size=4),
    data=st.binary(max_size=64),
)
def test_random_headers(tmp_path, header, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw_file(json.dumps(header).encode(), data))
    open_and_read(path, len(data))


@SETTINGS
@given(data=st.data())
def test_mutated_files(tmp_path, data):
    path = tmp_path / "m.safetensors"
    tensors = dict(list(sample_tensors().items())[:6])
    write_safetensors(path, tensors)
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, 7 + length) | st.integers(0, 7))
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789[]{}",:-')))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    content = content[:cut]
    path.write_bytes(content)
    open_and_read(path, len(content))


@SETTINGS
@given(sizes=st.lists(st.integers(0, 6), max_size=6), shuffle=st.randoms(use_true_random=False), pad=st.integers(0, 9))
def test_well_formed_headers_of_any_order_open(tmp_path, sizes, shuffle, pad):
    entries, position = [], 0
    for number, size in enumerate(sizes):
        entries.append((f"t{number}", {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}))
        position += size
    shuffle.shuffle(entries)
    content = bytes(range(position))
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw_file(json.dumps(dict(entries)).encode() + b" " * pad, content))
    checkpoint = open_and_read(path, position)
    if sizes:
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            assert checkpoint.read(name).tobytes() == content[begin:end]


@SETTINGS
@given(
    index=JSON | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=5), st.text(max_size=8) | JSON)})
)
def test_random_indices(tmp_path, index):
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_and_read(tmp_path / "m", 0) is None


def test_unmutated_file_opens(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = dict(list(sample_tensors().items())[:6])
    write_safetensors(path, tensors)
    checkpoint = open_and_read(path, 10_000)
    assert all(same_bytes(checkpoint.read(name), array) for name, array in tensors.items())
