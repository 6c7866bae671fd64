"""Hugging Face folders: config.json, tokenizer, and safetensors, of which each rank reads only its own
rows."""
import json
import math
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from lib import cpu, files, guards, parallel, tensor, varlen
from model import Config, Critic, Llama, init_weights


def read_config(folder):
    """The Config of folder/config.json. Raises FileNotFoundError, or ValueError naming file, key, value and
    what was expected."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Hugging Face model folder")
    return Config.from_dict(files.read_json(path), path)


SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Integers and float8 are left out: they are quantized, with their scales stored elsewhere.
READABLE_TYPES = ("F64", *SAFETENSORS_TYPES.values())
PROMPT_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")  # say how turns look
TOKEN = 4096  # longest token, in characters; the longest that occur have some hundreds
GROWTH = 64  # factor by which a tokenizer may lengthen a text; Unicode's normal forms reach 18


def weight_files(folder):
    """{tensor name: file} from a folder's model.safetensors or model.safetensors.index.json. No file lies
    outside the folder."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        names = files.read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{index}: weight_map is {type(names).__name__}, "
                             "expected an object of tensor names to file names")
        for name, file in names.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", "..") or "\\" in file:
                raise ValueError(f"{index}: weight_map sends {name} to {file!r}, "
                                 "expected a file name without a folder")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file}: no such file, "
                                        f"but {index.name} names it for {name}")
        return {name: folder / file for name, file in names.items()}
    if not single.is_file():
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor model.safetensors.index.json there "
                                "(for a random start give --from-scratch)")
    with open_weights(single) as f:
        return {name: single for name in f.keys()}


def open_weights(file):
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{file}: not a readable safetensors file: {e}") from None


def check_tensors(shapes, folder, ignore=()):
    """{file: names} of the tensors {name: shape}, checked against the safetensors' headers. A ValueError
    reports the first name, shape or type that does not fit. `ignore`: endings of names that may be there
    unused."""
    found = weight_files(folder)
    missing = [n for n in shapes if n not in found]
    extra = [n for n in found if n not in shapes and not n.endswith(tuple(ignore))]
    for what, names in (("lacks tensor", missing), ("has the unexpected tensor", extra)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{folder}: {what} {files.visible(names[0])}{more}; "
                             "the weights do not fit config.json")
    by_file = {}
    for name in shapes:
        by_file.setdefault(found[name], []).append(name)
    for file, names in by_file.items():
        with open_weights(file) as f:
            for name in names:
                try:
                    source = f.get_slice(name)
                    shape = source.get_shape()
                    kind = source.get_dtype()
                except SafetensorError as e:
                    raise ValueError(f"{file}: {name}: {e}") from None
                if list(shape) != list(shapes[name]):
                    raise ValueError(f"{file}: {name} has shape {list(shape)}, expected {list(shapes[name])}")
                if kind not in READABLE_TYPES:
                    raise ValueError(f"{file}: {name} has type {kind}, "
                                     f"expected one of {', '.join(READABLE_TYPES)}")
    return by_file


@torch.no_grad()
def load_tensors(targets, folder, ignore=()):
    """Fill the tensors {name: tensor} from a folder's safetensors. Each rank reads only its own part. All
    of them are checked before the first weight is read."""
    shapes = {name: target.shape for name, target in targets.items()}
    for file, names in check_tensors(shapes, folder, ignore).items():
        with open_weights(file) as f:
            for name in names:
                part = parallel.my_part(targets[name])
                if part[0].start < part[0].stop:
                    try:
                        parallel.local(targets[name]).copy_(f.get_slice(name)[part])
                    except SafetensorError as e:
                        raise ValueError(f"{file}: {name}: {e}") from None


def parameters(net):
    """The tensors of a net that a folder must have, {name: tensor}, and endings of names that it may also
    have."""
    tied = net.config.tie_word_embeddings or isinstance(net, Critic)
    targets = {n: p for n, p in net.named_parameters() if not n.startswith("value_head")}
    return targets, ["rotary_emb.inv_freq"] + (["lm_head.weight"] if tied else [])


def check_weights(folder):
    """Raise a ValueError unless the folder's weights fit its config.json. No weights are read, except a token
    head that according to config.json is the embedding."""
    config = read_config(folder)
    with torch.device("meta"):
        targets, ignore = parameters(Llama(config))
    check_tensors({name: p.shape for name, p in targets.items()}, folder, ignore)
    check_tied(folder, config, range(config.vocab_size))


def check_tied(folder, config, rows):
    """Raise a ValueError if config.json says that the token head is the embedding, but the folder has a head
    whose rows `rows` differ from it: one of the two would silently be ignored."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    found = weight_files(folder)
    if not config.tie_word_embeddings or names[0] not in found:
        return
    check_tensors({name: (config.vocab_size, config.hidden_size) for name in names}, folder, found)
    with open_weights(found[names[0]]) as head, open_weights(found[names[1]]) as embedding:
        both = [f.get_slice(name) for f, name in zip((head, embedding), names)]
        for first in range(rows.start, rows.stop, 4096):
            part = slice(first, min(first + 4096, rows.stop))
            if not torch.equal(*(x[part].double() for x in both)):
                raise ValueError(f"{found[names[0]]}: {names[0]} differs from {names[1]}, but config.json "
                                 "has tie_word_embeddings true; expected equal ones, or false there")


def measure(folder):
    """{file: [bytes, CRC-32]} of the files that a run takes from a model's folder. For weights, the CRC
    covers the header (names, types and shapes) and the first MiB after it. So another training of the same
    model is noticed without reading terabytes."""
    folder = Path(folder)
    found = {name: files.measure(folder / name) for name in ("config.json", "tokenizer.json")}
    for name in PROMPT_FILES:
        found[name] = files.measure(folder / name) if (folder / name).exists() else None
    # A folder without weights serves --from-scratch.
    weights = set(weight_files(folder).values()) if list(folder.glob("*.safetensors*")) else ()
    for file in weights:
        with open(file, "rb") as f:
            header = min(int.from_bytes(f.read(8), "little"), 10**8)
            found[file.name] = [file.stat().st_size, zlib.crc32(f.read(header + 2**20))]
    return found


def load(folder, cls=Llama, dtype=torch.bfloat16, device="cpu", mesh=None, compute_dtype=None, init_seed=None,
         offload=False):
    """Load a Llama or Critic from a Hugging Face folder. It is sharded over a `mesh` of more than one
    process, or split over a mesh that lib.tensor has made. offload is that of parallel.shard.

    A Critic takes the policy's trunk, and its head is drawn at random from `init_seed`. A Llama with
    `init_seed` is initialised at random.
    """
    config = read_config(folder)
    scratch = cls is Llama and init_seed is not None
    with torch.device("cpu" if scratch else "meta"):
        model = cls(config).to(dtype)
    if scratch:
        init_weights(model, init_seed)
    compute_dtype = compute_dtype or dtype
    split = mesh is not None and "tensor" in mesh.mesh_dim_names
    if compute_dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not split:
        cpu.accelerate(model)
    if compute_dtype == torch.bfloat16 and torch.device(device).type == "cuda":
        varlen.accelerate(model, compute_dtype, torch.device(device))
    if split:
        tensor.split(model, mesh)
    elif mesh is not None and (mesh.size() > 1 or offload):
        parallel.shard(model, mesh, compute_dtype, offload)
    elif compute_dtype != dtype:  # one process needs no FSDP, whose copies cost a tenth of an update on CPU
        model.model.dtype = compute_dtype
    device = "cpu" if offload else device
    if scratch:
        return model.to(device)
    model.to_empty(device=device)
    targets, ignore = parameters(model)
    load_tensors(targets, folder, ignore)
    check_tied(folder, config, parallel.my_part(model.model.embed_tokens.weight)[0])
    if cls is Critic:
        weight = torch.empty(1, config.hidden_size).normal_(
            0.0, 1 / (config.hidden_size + 1), generator=torch.Generator().manual_seed(init_seed or 0))
        with torch.no_grad():
            parallel.local(model.value_head.weight).copy_(weight[parallel.my_part(model.value_head.weight)])
    return model


def save(net, folder, dtype=None):
    """Write config.json and safetensors that transformers and vLLM load unchanged. dtype is the type in the
    file (default: that of the network)."""
    folder = Path(folder)
    save_tensors(((n, p) for n, p in net.named_parameters()), folder, dtype)
    if parallel.rank() == 0:
        name = str(dtype or next(net.parameters()).dtype).removeprefix("torch.")
        raw = {k: v for k, v in net.config.raw.items() if k != "dtype"} | {"torch_dtype": name}
        files.write_text(folder / "config.json", json.dumps(raw, indent=2) + "\n")


@torch.no_grad()
def save_tensors(named, folder, dtype=None, max_bytes=5 * 10**9):
    """Write (name, tensor) pairs as safetensors; beyond max_bytes, as several files with an index. Every rank
    calls it. Sharded tensors are gathered one by one, and rank 0 writes each at once, so that only one whole
    tensor is in memory. Files are written under temporary names and then renamed."""
    folder = Path(folder)
    parts = [[]]  # lists of (name, tensor, type in the file, bytes)
    size = 0
    for name, p in named:
        kind = dtype or p.dtype
        n = p.numel() * kind.itemsize
        if parts[-1] and size + n > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append((name, p, kind, n))
        size += n
    # Checked in the type of the file: numbers near the end of float32's range become infinite in bfloat16.
    guards.check_saved(folder, ((name, parallel.local(p).to(kind))
                                for entries in parts for name, p, kind, _ in entries))
    if parallel.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    for i, entries in enumerate(parts):
        with open(folder / f".part-{i}" if parallel.rank() == 0 else os.devnull, "wb") as f:
            # The format: 8 bytes of length, a header in JSON padded to a multiple of 8, and the tensors'
            # bytes one after the other.
            header = {"__metadata__": {"format": "pt"}}
            at = 0
            for name, p, kind, n in entries:
                header[name] = {"dtype": SAFETENSORS_TYPES[kind], "shape": list(p.shape),
                                "data_offsets": [at, at + n]}
                at += n
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            f.write(len(text).to_bytes(8, "little") + text)
            for _, p, kind, _ in entries:
                tensor = parallel.full(p.to(kind))
                if parallel.rank() == 0:
                    f.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
                del tensor
    if parallel.rank() == 0:
        for i in range(len(parts)):
            os.replace(folder / f".part-{i}", folder / shard_name(i, len(parts)))
        index = folder / "model.safetensors.index.json"
        if len(parts) > 1:
            total = sum(n for entries in parts for *_, n in entries)
            places = {name: shard_name(i, len(parts))
                      for i, entries in enumerate(parts) for name, *_ in entries}
            spec = {"metadata": {"total_size": total}, "weight_map": places}
            files.write_text(index, json.dumps(spec, indent=2) + "\n")
        else:
            index.unlink(missing_ok=True)


def shard_name(i, n):
    return "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; "
                                "expected a Hugging Face model folder with its tokenizer")
    spec = files.read_json(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises plain Exception
        raise ValueError(f"{path}: not a tokenizer: {e}") from None
    for part in ("normalizer", "decoder"):
        if growth(spec.get(part)) > GROWTH:
            raise ValueError(f"{path}: {part} may lengthen a text more than {GROWTH} times, "
                             "which could take all memory")
    # <|eot_id|> in a text stays text; templates place the special tokens by their ids.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = read_config(folder).vocab_size
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > size:
        raise ValueError(f"{path}: {len(vocabulary)} tokens, but config.json's vocab_size is {size}")
    largest = max(vocabulary, key=vocabulary.get)
    if vocabulary[largest] >= size:
        raise ValueError(f"{path}: token {files.visible(repr(largest))} has id {vocabulary[largest]}, "
                         f"but config.json's vocab_size is {size}")
    longest = max(vocabulary, key=len)
    if len(longest) > TOKEN:
        raise ValueError(f"{path}: token {files.visible(repr(longest))} has {len(longest)} characters, "
                         f"expected at most {TOKEN}")
    named_eos(folder)
    return tokenizer


def growth(part):
    """The largest factor by which a normalizer or decoder of a tokenizer.json may lengthen a text. A chain of
    replacements, each of a letter by ten, is a short file that turns a word into gigabytes."""
    kind = part.get("type") if part else None
    if kind == "Sequence":
        return math.prod(growth(step) for step in part.get("normalizers", part.get("decoders", ())))
    if kind == "Replace":
        pattern = part["pattern"].get("String")
        new = len(part["content"].encode())
        # A regular expression may match nothing at all, between any two letters.
        return max(1.0, new / len(pattern.encode())) if pattern else 1.0 + new
    if kind == "Prepend":
        return 1.0 + len(part["prepend"].encode())
    return {"NFC": 3.0, "NFD": 4.0, "NFKC": 18.0, "NFKD": 18.0, "Lowercase": 3.0, "BertNormalizer": 12.0,
            "ByteLevel": 2.0, "Precompiled": math.inf}.get(kind, 1.0)


def named_eos(folder):
    """The ids that end a response, first those in generation_config.json, then those in config.json."""
    ids = []
    size = read_config(folder).vocab_size
    for file in ("generation_config.json", "config.json"):
        path = Path(folder) / file
        if path.is_file():
            value = files.read_json(path).get("eos_token_id")
            named = value if isinstance(value, list) else [] if value is None else [value]
            for i in named:
                if type(i) is not int or not 0 <= i < size:
                    raise ValueError(f"{path}: eos_token_id has {files.visible(repr(i))}, "
                                     f"expected ids below vocab_size {size}")
                ids.append(i)
    return ids


def token_texts(tokenizer, ids):
    """The text of each token; joined, they are the decoded ids. Byte-level tokens may end inside a character:
    such a token gets no text, and the token that completes the character gets all of it."""
    texts = []
    start = 0
    for i in range(len(ids)):
        text = tokenizer.decode(ids[start : i + 1], skip_special_tokens=False)
        # A character has at most four bytes.
        if text.endswith("\ufffd") and i - start < 3 and i + 1 < len(ids):
            text = ""
        else:
            start = i + 1
        texts.append(text)
    return texts


def tokenizer_files(folder):
    """The files beside the weights that are copied to a trained model. They are checked, so that links in an
    untrusted folder cannot make us copy files from elsewhere on this machine. Hugging Face's cache consists
    of links, from models--NAME/snapshots/REVISION/FILE to models--NAME/blobs."""
    folder = Path(folder)
    found = []
    root = Path(os.path.realpath(folder))
    roots = [root]
    cache = root.parent.parent
    if root.parent.name == "snapshots" and cache.name.startswith("models--"):
        roots.append(cache / "blobs")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "special_tokens_map.json"):
        path = folder / name
        inside = set(roots) & set(Path(os.path.realpath(path)).parents)
        if path.is_symlink() and not (inside and path.exists()):
            raise ValueError(f"{path}: a link that leaves the folder or leads to nothing, "
                             "expected a file to copy")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected a regular file")
        if path.exists() and path.stat().st_size > files.JSON_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {files.JSON_BYTES}")
        if path.exists():
            found.append(path)
    return found


def copy_tokenizer(source, target):
    paths = tokenizer_files(source)
    if not any(path.name == "tokenizer.json" for path in paths):  # it was there when the run began
        raise FileNotFoundError(f"{Path(source) / 'tokenizer.json'}: no such file any more")
    for path in paths:
        files.write_text(Path(target) / path.name, path.read_bytes())
