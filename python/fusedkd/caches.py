"""Top-k teachers on disk and from elsewhere: a file format of safetensors, and readers of what other programs write.

Readers take what those programs have decoded; none imports them. What is absent there, by a mask, a sentinel or a short
row, has the id −1 and the log-probability −inf here. A reader's result is checked as a teacher is by `kd_loss`.
"""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checks
from .sparse import TopK

FORMAT, VERSION = "fusedkd.TopK", 1  # in the file's metadata; a newer version is refused
_IDS = torch.iinfo(torch.int32).max  # the largest id of a file
_PADDING = -1e8  # and below: what axolotl pads with is -1e9, which bfloat16 rounds
_MEGATRON_ABSENT = -1e3  # exact in float16 and bfloat16
_ROUNDING = 0.1  # nats by which quantised probabilities may exceed a sum of 1


# Files


def save(value: TopK, path: str | os.PathLike[str]) -> None:
    """`TopK.save`."""
    library, torch_format = _safetensors()
    checks.top_k("TopK", value)
    ids, logprobs = (x.detach().cpu() for x in (value.ids, value.logprobs))
    if ids.numel() and (int(ids.max()) > _IDS or int(ids.min()) < -1):
        raise ValueError(f"TopK.ids must lie in [0, {_IDS}], or be -1 where a token is absent: a file has int32")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "tail": value.tail,
        "temperature": repr(float(value.temperature)),
        "vocab_size": "none" if value.vocab_size is None else str(int(value.vocab_size)),
    }
    tensors = {"ids": ids.to(torch.int32).contiguous(), "logprobs": logprobs.contiguous()}
    target = Path(path)
    # In the same folder, so that what follows is one step of the file system.
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(unfinished, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        torch_format.save_file(tensors, unfinished, metadata=metadata)
        os.chmod(unfinished, mode)  # safetensors makes files for their owner alone, whatever the umask
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # else a crash may leave the new name with none of the new bytes
        os.replace(unfinished, target)
    except library.SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> TopK:
    """`TopK.load`."""
    library, _ = _safetensors()
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name} is no file")
    try:
        with library.safe_open(name, framework="pt", device=str(device)) as file:
            tail, temperature, vocab_size = _read_metadata(name, file.metadata() or {})
            missing = sorted({"ids", "logprobs"} - set(file.keys()))
            if missing:
                raise _refusal(name, f"it has no {' and no '.join(missing)}, but {', '.join(file.keys()) or 'nothing'}")
            ids, logprobs = file.get_tensor("ids"), file.get_tensor("logprobs")
    except library.SafetensorError as error:
        raise _refusal(name, f"it is no safetensors file, or not all of one ({error})") from error
    if ids.dtype != torch.int32:
        raise _refusal(name, f"its ids are {ids.dtype}, and must be int32")
    found = TopK(ids, logprobs, tail, temperature, vocab_size)
    try:
        checks.top_k("TopK", found)
    except (TypeError, ValueError) as error:
        raise _refusal(name, str(error)) from error
    return found


def _safetensors() -> tuple[Any, Any]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "TopK.save and TopK.load need safetensors, which is not installed: pip install safetensors "
            "(or the extra: pip install 'fusedkd[cache]')"
        ) from error
    return safetensors, safetensors.torch


def _refusal(name: str, reason: str) -> ValueError:
    return ValueError(f"{name} cannot be read as a cache of TopK.save: {reason}")


def _read_metadata(name: str, metadata: Mapping[str, str]) -> tuple[str, float, int | None]:
    """Tail, temperature and vocabulary size, which a later check judges as it does those of a call."""
    if metadata.get("format") != FORMAT:
        raise _refusal(name, f"its metadata has the format {metadata.get('format')!r}, and must have {FORMAT!r}")
    version = metadata.get("version", "")
    if version.isdecimal() and int(version) > VERSION:
        raise _refusal(
            name, f"it has version {version} of the format, and this fusedkd reads up to {VERSION}: install a newer one"
        )
    try:
        if int(version) != VERSION:
            raise ValueError(f"version {version}")
        vocab_size = metadata["vocab_size"]
        return (
            metadata["tail"],
            float(metadata["temperature"]),
            None if vocab_size == "none" else int(vocab_size),
        )
    except (KeyError, ValueError) as error:
        raise _refusal(name, f"its metadata {dict(metadata)} is wrong or incomplete ({error})") from error


# Readers


def from_vllm(
    prompt_logprobs: Any, k: int | None, shift: bool, tail: str, temperature: float, vocab_size: int | None
) -> TopK:
    """`TopK.from_vllm`."""
    if not _is_sequence(prompt_logprobs):
        raise TypeError(
            "prompt_logprobs must be a list with a dict (or None) for each position, or a list of such lists, got "
            f"{type(prompt_logprobs).__name__}"
        )
    if k is not None:
        checks.integer("k", k)
        checks.within("k", k, 1, checks.MOST_LISTED)
    checks.flag("shift", shift)
    name, batched = "prompt_logprobs", any(_is_sequence(x) for x in prompt_logprobs)
    rows = (
        [_vllm_rows(f"{name}[{i}]", x, k, shift) for i, x in enumerate(prompt_logprobs)]
        if batched
        else _vllm_rows(name, prompt_logprobs, k, shift)
    )
    depth = 2 + batched
    ids = _padded(_mapped(rows, depth, lambda pair: pair[0]), depth, -1)
    logprobs = _padded(_mapped(rows, depth, lambda pair: pair[1]), depth, -torch.inf)
    return _checked("from_vllm", ids, logprobs, None, tail, temperature, vocab_size)


def _vllm_rows(name: str, positions: Any, k: int | None, shift: bool) -> list[list[tuple[int, float]]]:
    """(id, log-probability) of each position, the likeliest first; no position of a request that asked for none."""
    rows = [_vllm_row(f"{name}[{i}]", x)[:k] for i, x in enumerate(positions or ())]
    return [*rows[1:], []] if shift and rows else rows


def _vllm_row(name: str, entries: Any) -> list[tuple[int, float]]:
    if entries is None:
        return []
    if not isinstance(entries, Mapping):
        raise TypeError(f"{name} must be a dict from token ids to log-probabilities, or None, got {entries!r:.80}")
    found: dict[int, float] = {}
    for token, entry in entries.items():
        value: Any = entry.get("logprob") if isinstance(entry, Mapping) else getattr(entry, "logprob", entry)
        at = _token_id(name, token, served=isinstance(entry, Mapping))
        try:
            logprob = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name}[{token!r}] must have a log-probability, got {entry!r:.80}") from None
        if logprob != -torch.inf:
            found.setdefault(at, logprob)
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))


def _token_id(name: str, token: Any, served: bool) -> int:
    """The id that a key stands for. JSON has only strings as keys, so a server's are numbers in digits."""
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    if isinstance(token, str):
        digits = token.removeprefix("token_id:")
        if digits.isdecimal() and (served or digits != token):
            return int(digits)
    elif hasattr(token, "__index__"):
        return int(token)
    raise ValueError(
        f"{name} has the key {token!r:.40}, and must have token ids. OpenAI's top_logprobs name tokens by their text, "
        "from which ids cannot be told without the teacher's tokenizer: ask vLLM for prompt_logprobs, or for "
        "return_tokens_as_token_ids"
    )


def from_distillkit(
    target_ids: Any,
    target_values: Any,
    mask: Any,
    log_target: bool,
    tail: str,
    temperature: float,
    vocab_size: int | None,
) -> TopK:
    """`TopK.from_distillkit`."""
    checks.flag("log_target", log_target)
    ids, values = _pair("target_ids", target_ids, "target_values", target_values)
    if not log_target and tail != "renormalize":
        raise ValueError(
            f"log_target=False says that target_values are logits, whose softmax over all tokens is not known, and "
            f"tail is {tail!r}: use tail='renormalize'"
        )
    absent = _absent("mask", mask, ids) | (ids == -1)
    values = torch.where(absent, -torch.inf, values.float())
    total = values.logsumexp(-1, keepdim=True)
    if not log_target:
        values = torch.where(absent, -torch.inf, values - total)
    else:
        # Values out of a quantised cache may sum to more than 1, which no softmax does.
        values = values - torch.where(total < _ROUNDING, total.clamp(min=0.0), 0.0)
    return _checked("from_distillkit", ids, values, absent, tail, temperature, vocab_size)


def from_axolotl(
    target_token_ids: Any, target_logprobs: Any, target_mask: Any, tail: str, temperature: float, vocab_size: int | None
) -> TopK:
    """`TopK.from_axolotl`."""
    ids, logprobs = _pair("target_token_ids", target_token_ids, "target_logprobs", target_logprobs)
    absent = _absent("target_mask", target_mask, ids) | (logprobs <= _PADDING)
    return _checked("from_axolotl", ids, logprobs, absent, tail, temperature, vocab_size)


def from_megatron(
    values: Any, indices_low: Any, bit_17: Any, tail: str, temperature: float, vocab_size: int | None
) -> TopK:
    """`TopK.from_megatron`."""
    for name, x in (
        ("values", values),
        ("indices_low", indices_low),
        *([] if bit_17 is None else [("bit_17", bit_17)]),
    ):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.shape != values.shape:
            raise ValueError(f"{name} must have the shape {tuple(values.shape)} of values, got {tuple(x.shape)}")
    if indices_low.dtype not in (torch.uint16, torch.int32, torch.int64):
        raise TypeError(f"indices_low must be uint16, or int32 or int64 with whole ids, got {indices_low.dtype}")
    checks.tensor("values", values)
    ids = indices_low.to(torch.int32)
    if bit_17 is not None:
        if bit_17.dtype != torch.bool or indices_low.dtype != torch.uint16:
            raise TypeError(
                "indices_low and bit_17 must be uint16 and bool, the two parts of an id, got "
                f"{indices_low.dtype} and {bit_17.dtype}"
            )
        ids = ids | (bit_17.to(torch.int32) << 16)
    # An absent id, -1, is packed as 131071, which is a token's where there are as many: the value tells.
    return _checked("from_megatron", ids, values, values <= _MEGATRON_ABSENT, tail, temperature, vocab_size)


def _checked(
    reader: str,
    ids: Tensor,
    logprobs: Tensor,
    absent: Tensor | None,
    tail: str,
    temperature: float,
    vocab_size: int | None,
) -> TopK:
    """A TopK that `kd_loss` takes."""
    nothing = (ids == -1) | (logprobs == -torch.inf)
    absent = nothing if absent is None else absent | nothing
    found = TopK(torch.where(absent, -1, ids), torch.where(absent, -torch.inf, logprobs), tail, temperature, vocab_size)
    name = f"TopK.{reader}(...)"
    checks.top_k(name, found)
    checks.listed(found, _IDS if vocab_size is None else vocab_size, name)
    return found


def _pair(of_ids: str, ids: Any, of_values: str, values: Any) -> tuple[Tensor, Tensor]:
    """Ids and values of one shape as tensors; lists of rows of different length are filled up."""
    these, those = _as_tensor(of_ids, ids, -1), _as_tensor(of_values, values, float("-inf"))
    if these.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{of_ids} must be int32 or int64, got {these.dtype}")
    checks.tensor(of_values, those)
    if these.shape != those.shape or these.dim() < 1:
        raise ValueError(
            f"{of_values} must have the shape (..., K) of {of_ids}, {tuple(these.shape)}, got {tuple(those.shape)}"
        )
    return these, those.float() if those.dtype == torch.float64 else those


def _absent(name: str, mask: Any, ids: Tensor) -> Tensor:
    """Where a mask of rows or of entries has none, as a bool tensor of the shape of the ids."""
    if mask is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    given = _as_tensor(name, mask, 0.0).to(ids.device) != 0
    if given.shape == ids.shape[:-1]:
        given = given.unsqueeze(-1)
    if given.shape not in (ids.shape, (*ids.shape[:-1], 1)):
        raise ValueError(
            f"{name} must have the shape {tuple(ids.shape)} of the ids, or that without the last axis, got "
            f"{tuple(given.shape)}"
        )
    return ~given.expand(ids.shape)


def _as_tensor(name: str, value: Any, fill: float) -> Tensor:
    if isinstance(value, Tensor):
        return value
    plain = _plain(value)
    if not _is_sequence(plain):
        raise TypeError(f"{name} must be a tensor, an array or nested lists, got {type(value).__name__}")
    depth = _depth(plain) if plain else 2
    for number in _numbers(name, plain, depth):
        if isinstance(fill, int) and not isinstance(number, int):
            raise TypeError(f"{name} must hold whole numbers, got {number!r}")
    try:
        return _padded(plain, depth, fill)
    except (RuntimeError, OverflowError) as error:  # torch's word for a number that no int64 holds
        raise ValueError(f"{name} must hold numbers that fit a tensor: {error}") from None


def _numbers(name: str, value: Any, depth: int) -> Iterator[float]:
    """The numbers of nested lists, each `depth` lists deep; None stands for an empty list."""
    for x in () if value is None else value:
        if depth > 1 and (x is None or _is_sequence(x)):
            yield from _numbers(name, x, depth - 1)
        elif depth > 1 or not isinstance(x, int | float):
            raise TypeError(f"{name} must be lists of numbers, all equally deep, got {x!r} among them")
        else:
            yield x


def _plain(value: Any) -> Any:
    """Nested lists of what may be lists of arrays or tensors."""
    if hasattr(value, "tolist"):
        return _plain(value.tolist())  # an array of objects has arrays in it
    return [_plain(x) for x in value] if _is_sequence(value) else value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _depth(value: Any) -> int:
    """How many lists are around a number."""
    return 1 + max(map(_depth, value), default=0) if _is_sequence(value) else 0


def _mapped(value: Any, depth: int, of_each: Callable[[Any], Any]) -> Any:
    """Nested lists with `of_each` of what is `depth` lists deep."""
    return [of_each(x) if depth == 1 else _mapped(x, depth - 1, of_each) for x in value]


def _padded(value: Any, depth: int, fill: float) -> Tensor:
    """Nested lists as a tensor of `depth` axes, as long as the longest, of one column at least; None is empty."""
    extent = [0] * depth

    def measure(part: Any, axis: int) -> None:
        part = () if part is None else part
        extent[axis] = max(extent[axis], len(part))
        if axis + 1 < depth:
            for x in part:
                measure(x, axis + 1)

    def filled(part: Any, axis: int) -> list[Any]:
        part = () if part is None else part
        if axis + 1 == depth:
            return [*part, *[fill] * (extent[axis] - len(part))]
        return [filled(x, axis + 1) for x in (*part, *[None] * (extent[axis] - len(part)))]

    measure(value, 0)
    extent[-1] = max(extent[-1], 1)
    dtype = torch.float32 if isinstance(fill, float) else torch.int64
    return torch.tensor(filled(value, 0), dtype=dtype, device="cpu").view(extent)
