"""rlsp.py export: makes a Hugging Face folder from any checkpoint of a run."""
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lib import chat, checkpoint, cli, files, hf, parallel
from lib.chat import Prompting
from lib.flags import REQUIRED, checked, flag
from model import Llama

RUN_FILES = ("config.json", "tokenizer.json")  # files of the run's model that must not have changed


@dataclass(kw_only=True)
class Export:
    """Make a Hugging Face folder from any checkpoint of a run. It runs on one process, however many wrote the
    checkpoint."""
    command = "export"
    folder: str = flag("model and data", REQUIRED, "folder that sft or ppo wrote", option="RUN")
    checkpoint: str | None = flag(
        "model and data", None, "a checkpoint such as step-000020, or best: the one with the best held-out "
        "accuracy (default: the newest)")
    model: str | None = flag(
        "model and data", None, "the model that the run started from, if its folder has moved; its "
        "config.json and tokenizer are needed")
    out: str = flag("run", REQUIRED, "folder to write; must not exist")


def export(args):
    """Write the checkpoint's policy in the form of RUN/model, in the type that the run computed in."""
    with cli.checked_input():
        run, out = Path(args.folder), Path(args.out)
        if parallel.world_size() > 1:
            raise ValueError("export runs on one process: start it without torchrun")
        if not (run / "config.json").is_file():
            raise FileNotFoundError(f"{run / 'config.json'}: no such file; expected the folder of a run")
        config = cli.saved_run(run)
        flags = config["flags"]
        if flags.get("command") not in ("sft", "ppo"):
            raise ValueError(f"{run / 'config.json'}: a run of {files.visible(flags.get('command'))}, "
                             "expected one of sft or ppo")
        if out.exists() or out.is_symlink():
            raise FileExistsError(f"{out}: exists already; nothing was overwritten, give another --out")
        dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(flags.get("dtype"))
        if dtype is None:
            raise ValueError(f"{run / 'config.json'}: dtype is {files.visible(repr(flags.get('dtype')))}, "
                             "expected bfloat16 or float32")
        source = start_of(run, args.model or flags.get("model"), config["inputs"].get("model"))
        asked = chat.Chat(source, Prompting(**{f.name: checked(f, flags[f.name]) for f in fields(Prompting)
                                               if f.name in flags}))
        found = checkpoint.find(run, args.checkpoint)
        if not found:
            raise FileNotFoundError(f"{run / 'checkpoints'}: no checkpoint there yet")
        with torch.device("meta"):
            net = Llama(hf.read_config(source)).to(dtype)
        net.to_empty(device="cpu")
        checkpoint.load({f"policy.{name}": p for name, p in net.named_parameters()}, found[0])
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        hf.save(net, aside)
        asked.write(aside)
        aside.rename(out)
    except OSError as e:  # a failed write does not name its file
        raise OSError(e.errno, e.strerror, str(e.filename or out)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"wrote {files.visible(out, 1000)}: step {found[1]['step']} of {files.visible(run, 1000)}, "
          f"{size / 1e9:.2f} GB, {flags['dtype']}")


def start_of(run, folder, then):
    """The folder of the model that a run started from. Raises a ValueError if it has another model now.
    RUN/model, which the run wrote itself, is accepted as well."""
    if not isinstance(folder, str):
        raise ValueError(f"{run / 'config.json'}: model is {files.visible(repr(folder))}, "
                         "expected a folder's name")
    for name in RUN_FILES:
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{Path(folder) / name}: no such file; give the folder of the model that "
                                    "the run started from as --model")
    hf.tokenizer_files(folder)
    if Path(folder).resolve() != (run / "model").resolve() and isinstance(then, dict):
        for name in RUN_FILES:
            now = files.measure(Path(folder) / name)
            if then.get(name, now) != now:
                raise ValueError(f"{Path(folder) / name} is not what the run was started with: "
                                 f"[bytes, CRC-32] is {now}, it was {files.visible(then[name], 60)}; "
                                 "give the right folder as --model")
    return folder
