"""Reading safetensors: the same tensors as the library, only those that are wanted, and no more bytes than that."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from glmpp.checkpoint import TORCH_DTYPES, read_header, read_shard
from glmpp.errors import GlmppError


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def raw_file(path, entries: dict, data: bytes, pad: int = 0):
    """A safetensors file written by hand: the library would align and sort it."""
    header = json.dumps(entries).encode() + b" " * pad
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_tensors_and_order_are_the_librarys(tiny):
    for file in {spec.file for spec in tiny.values()}:
        path = tiny.directory / file
        with safe_open(path, "pt") as shard:
            expected = [(name, shard.get_tensor(name)) for name in shard.keys()]  # noqa: SIM118
        found = list(read_shard(path))
        assert [name for name, _ in found] == [name for name, _ in expected]
        for (name, ours), (_, theirs) in zip(found, expected):
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), name
            assert bits(ours) == bits(theirs), name


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abcx.0", min_size=1, max_size=6),
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    ),
    st.integers(0, 7),
    st.data(),
)
def test_any_tensors_at_any_alignment_come_back(tmp_path_factory, layout, pad, data):
    """Written back to back without alignment, in the order of the dict: what the format allows and writers avoid."""
    entries, content = {}, b""
    for name, (dtype, shape) in layout.items():
        size = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device="meta").nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + size]}
        content += data.draw(st.binary(min_size=size, max_size=size))
    path = raw_file(tmp_path_factory.mktemp("shard") / "a.safetensors", entries, content, pad)
    wanted = {name for name in layout if data.draw(st.booleans())}
    found = dict(read_shard(path, wanted.__contains__))
    assert list(found) == sorted(wanted)
    for name, tensor in found.items():
        dtype, shape = layout[name]
        start, end = entries[name]["data_offsets"]
        assert (tensor.dtype, list(tensor.shape), bits(tensor)) == (TORCH_DTYPES[dtype], shape, content[start:end])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 255), st.integers(0, 40))
def test_a_damaged_file_is_refused_whenever_the_library_refuses_it(tmp_path_factory, at, flip, cut):
    good = tmp_path_factory.getbasetemp() / "good.safetensors"
    if not good.exists():
        save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(5, dtype=torch.int8)}, good, {"format": "pt"})
    content = bytearray(good.read_bytes())
    content[at % len(content)] ^= flip
    path = good.with_name("bad.safetensors")
    path.write_bytes(content[: len(content) - cut * (at % 2)])
    try:
        expected = load_file(path)
    except (SafetensorError, UnicodeDecodeError, ValueError, OSError, KeyError):
        with pytest.raises(GlmppError, match=r"bad\.safetensors"):
            list(read_shard(path))
        return
    try:
        found = dict(read_shard(path))
    except GlmppError:
        return  # stricter than the library: names twice, types that torch has not
    assert found.keys() == expected.keys()
    assert all(bits(found[name]) == bits(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("entries", "data", "why"),
    [
        ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {"dtype": "U8"}}', b"x", "lists 'a' twice"),
        ('{"a": 1, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"x", "lists 'a' twice"),
        ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "dtype": "U8"}}', b"x", "lists 'dtype' twice"),
        ('{"__metadata__": {"b": "", "b": ""}}', b"", "lists 'b' twice"),
        ('{"a": {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}}', b"x", "not described by"),
        ('{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}', b"x", "does not have 1 bytes"),
        ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}', b"xy", "the one before it ends at"),
        ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"xy", "the tensors end at"),
        ('{"a": {"dtype": "U8", "shape": [-1], "data_offsets": [1, 0]}}', b"", "not described by .* >= 0"),
        ('{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}', b"x", "not described by .* got `bool`"),
        ('{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}', b"x" * 8, "no type for"),
        (
            '{"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}',
            b"x",
            "not described by dtype, shape and",
        ),
        ('{"a": 3}', b"", "not described by dtype, shape and"),
        ('{"__metadata__": {"a": 1}}', b"", "not a map of strings"),
        (f'{{"a": {{"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": {"1" * 5000}}}}}', b"x", "not JSON"),
        (f'{{"a": {{"dtype": "U8", "shape": [{"1" * 5000}], "data_offsets": [0, 1]}}}}', b"x", "not described by"),
        ("[]", b"", "not a JSON object"),
        ("{" * 50_000, b"", "not JSON"),
        ('{"a\\u001b[31m": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}', b"x", r"a\\x1b\[31m"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(tmp_path, entries, data, why):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(entries).to_bytes(8, "little") + entries.encode() + data)
    with pytest.raises(GlmppError, match=why) as caught:
        list(read_shard(path))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("content", [b"", b"\x01", (2**63).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"])
def test_a_cut_header_is_refused_before_it_is_read(tmp_path, content):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content)
    with pytest.raises(GlmppError, match=r"cut\.safetensors.*the header alone"):
        list(read_shard(path))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the page cache")
def test_of_a_shard_that_is_wanted_in_part_only_that_part_is_read(tmp_path):
    """Cold: 2 tensors of 20, 3 MB each. The library's way of handing out all 20 reads the whole file."""
    from glmpp._load_time_child import drop_from_cache, resident_bytes

    path = tmp_path / "a.safetensors"
    save_file({f"t{i:02}": torch.full((3, 1024, 1024), i, dtype=torch.int8) for i in range(20)}, path)
    if drop_from_cache([path]) > 0:
        pytest.skip("this file system keeps its pages")
    for name, tensor in read_shard(path, {"t03", "t11"}.__contains__):
        assert int(tensor.sum()) == 3 * 1024 * 1024 * int(name[1:])
    assert 2 * 3 * 2**20 <= resident_bytes(path) <= 1.05 * 2 * 3 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_one_tensor(tmp_path):
    """24 tensors of 4 MB through one buffer: anonymous memory grows by less than two of them."""
    save_file({f"t{i:02}": torch.ones(2, 1024, 1024, dtype=torch.bfloat16) for i in range(24)}, tmp_path / "a.safetensors")
    buffer = torch.zeros(2, 1024, 1024, dtype=torch.bfloat16)

    def anonymous() -> int:
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024

    before, peak = anonymous(), 0
    for _, tensor in read_shard(tmp_path / "a.safetensors"):
        buffer.copy_(tensor)
        peak = max(peak, anonymous() - before)
    assert peak < 2 * buffer.nbytes


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(GlmppError, match=r"gone\.safetensors: cannot be opened"):
        list(read_shard(tmp_path / "gone.safetensors"))


def test_a_header_is_read_without_the_data(tmp_path):
    """What a range request fetches is enough."""
    import io

    save_file({"a": torch.zeros(4, 4)}, tmp_path / "a.safetensors", {"format": "pt"})
    content = (tmp_path / "a.safetensors").read_bytes()
    head = io.BytesIO(content[: 8 + int.from_bytes(content[:8], "little")])
    header = read_header(head, len(content), "a")
    assert header == {"a": ("F32", (4, 4), len(head.getvalue()), len(content))}
