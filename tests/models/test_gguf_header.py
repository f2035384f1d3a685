import struct
from pathlib import Path

import pytest

from excise.errors import CheckpointError
from excise.models.gguf_header import require_sound_gguf
from excise.models.loading import load
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model

STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4


def file_with(path: Path, value: bytes, *, count: int = 1, order: str = "<") -> Path:
    head = b"GGUF" + struct.pack(f"{order}IQQ", 3, 0, count)
    path.write_bytes(head + struct.pack(f"{order}Q", 1) + b"k" + value)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "inner", "length"),
    [
        (ARRAY, UINT8, 2**63),
        (ARRAY, UINT32, 10**12),
        (ARRAY, STRING, 2**62),
        (ARRAY, ARRAY, 2**40),
        (STRING, None, 2**63),
    ],
)
def test_lengths_beyond_the_file_are_refused_at_once(
    tmp_path: Path, order: str, kind: int, inner: int | None, length: int
) -> None:
    form = f"{order}I" + ("" if inner is None else "I") + "Q"
    value = struct.pack(form, *(number for number in (kind, inner, length) if number is not None))
    with pytest.raises(CheckpointError, match="claims"):
        require_sound_gguf(file_with(tmp_path / "m.gguf", value, order=order))


def test_as_many_entries_as_fit_and_types_that_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="claims"):
        require_sound_gguf(file_with(tmp_path / "m.gguf", struct.pack("<IB", UINT8, 1), count=2**63))
    with pytest.raises(CheckpointError, match="type 77"):
        require_sound_gguf(file_with(tmp_path / "m.gguf", struct.pack("<I", 77)))


def test_whole_files_pass_and_others_are_left_to_their_reader(tmp_path: Path) -> None:
    write_gguf(tiny_model("llama", 4), tmp_path / "m.gguf")
    require_sound_gguf(tmp_path / "m.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    require_sound_gguf(tmp_path / "empty.gguf")


def test_a_model_larger_than_its_tensors_is_not_built(tmp_path: Path) -> None:
    write_gguf(tiny_model("llama", 4), tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    at = content.index(b"llama.block_count") + len("llama.block_count") + 4
    (tmp_path / "m.gguf").write_bytes(content[:at] + struct.pack("<I", 10**6) + content[at + 4 :])
    with pytest.raises(CheckpointError, match="claims 1,000,000 layers"):
        load(str(tmp_path / "m.gguf"))
