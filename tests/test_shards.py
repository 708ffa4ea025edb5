"""Reading safetensors: the same tensors as the library, only those that are wanted, and no more bytes than that."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file

from glmpp.checkpoint import Checkpoint
from glmpp.errors import GlmppError
from glmpp.formats import tensor as types
from glmpp.formats.header import read_header
from glmpp.formats.shard import read_shard
from glmpp.formats.tensor import TensorSpec, bits


def bytes_of(tensor: torch.Tensor) -> bytes:
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
            assert bytes_of(ours) == bytes_of(theirs), name


# --- every dtype: what the library takes, the kit takes -------------------------------------------------------------


def names_of_the_library() -> list[str]:
    """Every dtype name that the installed library accepts in a header; it lists them when it refuses one."""
    header = json.dumps({"a": {"dtype": "?", "shape": [0], "data_offsets": [0, 0]}}).encode()
    with pytest.raises(SafetensorError) as error:
        deserialize(len(header).to_bytes(8, "little") + header)
    return re.findall("`([A-Z0-9_]+)`", str(error.value))


def types_that_can_be_saved(folder) -> list[torch.dtype]:
    found = []
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        try:
            save_file({"a": torch.zeros(16, dtype=torch.uint8).view(dtype)}, folder / "try.safetensors")
        except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError, NotImplementedError):
            continue
        found.append(dtype)
    return sorted(found, key=str)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    kinds = [(tensor.dtype, tensor.shape, bytes_of(tensor)) for tensor in (ours, theirs)]
    return kinds[0] == kinds[1]


def test_every_type_that_can_be_saved_comes_back_as_the_library_reads_it(tmp_path):
    dtypes = types_that_can_be_saved(tmp_path)
    assert len(dtypes) >= 15 and torch.uint64 in dtypes and torch.complex64 in dtypes and torch.float8_e5m2fnuz in dtypes
    tensors = {}
    for dtype in dtypes:
        data = torch.arange(96, dtype=torch.uint8)
        data = data % 2 if dtype is torch.bool else data
        for shape in ((), (0,), (3,), (2, 3), (2, 1, 3), (0, 3)):
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors[f"{dtype} {shape}"] = data[:size].clone().view(dtype).view(shape)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if savable(name, tensor, tmp_path)}, path)
    found, expected = dict(read_shard(path)), load_file(path)
    assert found.keys() == expected.keys() and len(found) > 5 * len(dtypes)
    for name, tensor in found.items():
        assert same(tensor, expected[name]) and same(tensor, tensors[name]), name
    (tmp_path / "config.json").write_text("{}")
    for name, spec in Checkpoint.from_directory(tmp_path).items():
        theirs = expected[name]
        assert (spec.meta().dtype, spec.meta().shape, spec.nbytes) == (theirs.dtype, theirs.shape, theirs.nbytes), name
        assert spec.torch_dtype == theirs.dtype and spec.numel == theirs.numel() * (2 if spec.dtype == "F4" else 1)


def savable(name: str, tensor: torch.Tensor, folder) -> bool:
    """Not every shape of a packed type: half a byte is none."""
    try:
        save_file({name: tensor}, folder / "try.safetensors")
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize("dtype", names_of_the_library())
@pytest.mark.parametrize("shape", [[8], [2, 4], [4, 2, 1], [0, 2], [2, 3], [], [3]], ids=str)
def test_a_header_of_any_dtype_is_read_or_refused_as_the_library_does(tmp_path, dtype, shape):
    """Written by hand: F6 types have no type in torch, and of F4 some shapes have none."""
    nbits = torch.Size(shape).numel() * bits(dtype)
    for size in {nbits // 8, nbits // 8 + 1}:
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
        path = raw_file(
            tmp_path / "model.safetensors",
            {"a": entry, "b": {**PLAIN, "data_offsets": [size, size + 2]}},
            b"\1" * (size + 2),
        )
        (tmp_path / "config.json").write_text("{}")
        try:
            with safe_open(path, "pt") as shard:
                assert shard.get_slice("a").get_shape() == shape
        except SafetensorError:
            with pytest.raises(GlmppError, match=r"model\.safetensors"):
                Checkpoint.from_directory(tmp_path)
            continue
        spec = Checkpoint.from_directory(tmp_path)["a"]
        assert (spec.dtype, list(spec.shape), spec.nbytes) == (dtype, shape, size)
        assert [name for name, _ in read_shard(path, {"b"}.__contains__)] == ["b"]  # what is not wanted is not asked for
        try:
            expected = load_file(path)
        except SafetensorError:
            with pytest.raises(GlmppError, match=rf"model\.safetensors: tensor 'a': torch .* no type for {dtype} of shape"):
                list(read_shard(path))
            with pytest.raises(GlmppError, match=rf"model\.safetensors: tensor 'a': torch .* no type for {dtype} of shape"):
                spec.meta()
            continue
        found = dict(read_shard(path))
        assert found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in found)
        assert (spec.meta().dtype, spec.meta().shape) == (expected["a"].dtype, expected["a"].shape)


PLAIN = {"dtype": "U8", "shape": [2]}


def packable(dtype: str, shape: list[int]) -> list[int]:
    """A shape that the type can be stored in: of F4 an even number in the last dimension."""
    return [*shape, 2] if dtype == "F4" else shape


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abcx.0", min_size=1, max_size=6),
        st.tuples(st.sampled_from(sorted(types.torch_dtypes())), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    ),
    st.integers(0, 7),
    st.data(),
)
def test_any_tensors_at_any_alignment_come_back(tmp_path_factory, layout, pad, data):
    """Written back to back without alignment, in the order of the dict: what the format allows and writers avoid."""
    entries, stored = {}, b""
    for name, (dtype, shape) in layout.items():
        shape = packable(dtype, shape)
        size = TensorSpec(name, dtype, tuple(shape)).nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(stored), len(stored) + size]}
        stored += data.draw(st.binary(min_size=size, max_size=size))
    path = raw_file(tmp_path_factory.mktemp("shard") / "a.safetensors", entries, stored, pad)
    wanted = {name for name in layout if data.draw(st.booleans())}
    found = dict(read_shard(path, wanted.__contains__))
    assert list(found) == sorted(wanted)
    for name, tensor in found.items():
        start, end = entries[name]["data_offsets"]
        assert (tensor.dtype, tuple(tensor.shape)) == TensorSpec(
            name, entries[name]["dtype"], tuple(entries[name]["shape"])
        ).in_torch
        assert bytes_of(tensor) == stored[start:end]


# --- damaged files --------------------------------------------------------------------------------------------------


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
    assert all(bytes_of(found[name]) == bytes_of(tensor) for name, tensor in expected.items())


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
        ('{"a": {"dtype": "C65", "shape": [1], "data_offsets": [0, 8]}}', b"x" * 8, "'a' has dtype 'C65', which is none"),
        ('{"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}', b"x", r"F4 of shape \(3,\) does not have 1 bytes"),
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
    from glmpp.dryrun.child.load_time import drop_from_cache, resident_bytes

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
