"""The edge to Hydra: command line -> typed, checked config -> task; errors become one line and an exit code."""

import dataclasses
import difflib
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Callable

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dropkey.config.check import nearest
from dropkey.config.identity import flatten
from dropkey.config.schema import EvalConfig, TrainConfig
from dropkey.errors import ConfigError, Interrupted, RunError

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}
TABLE = "table"  # a directory of configs that are not of one run, see dropkey/reproduction/tables.py
OPTIONAL = {"train": ("experiment", "debug"), "eval": ("data",)}  # groups that may be null


def register_schemas() -> None:
    for name, schema in SCHEMAS.items():
        node = OmegaConf.structured(schema)
        if name == "train":  # arguments of constructors are free: model.args.qk_norm=true needs no +
            OmegaConf.set_struct(node.task.args, False)
            OmegaConf.set_struct(node.model.args, False)
            OmegaConf.set_struct(node.optim.args, False)
        ConfigStore.instance().store(name=f"{name}_schema", node=node)


def typed(cfg: DictConfig):
    """The dataclass behind a composed config; raises ConfigError for keys and values that the schema lacks."""
    unknown = [key for key in extra_keys(cfg) if not key.startswith(("task.args.", "model.args.", "optim.args."))]
    if unknown:
        keys = valid_keys("eval" if OmegaConf.get_type(cfg) is EvalConfig else "train")
        raise ConfigError(f"{unknown[0]} is no key of the config; {nearest_key(unknown[0], keys, groups())}")
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from None


def extra_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Keys that +key=value slipped past the schema."""
    fields = {field.name for field in dataclasses.fields(OmegaConf.get_type(cfg))}
    found = [prefix + str(key) for key in cfg if key not in fields]
    for key in fields & set(cfg):
        if OmegaConf.is_dict(cfg[key]) and dataclasses.is_dataclass(OmegaConf.get_type(cfg[key])):
            found += extra_keys(cfg[key], f"{prefix}{key}.")
    return found


def compose(overrides: list[str] = (), config_name: str = "train"):
    """The config that `train.py <overrides>` would run, unchecked. For scripts, notebooks and tests."""
    register_schemas()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return typed(hydra.compose(config_name, list(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, list(overrides), config_name)) from None


def load(path: Path, schema: type = TrainConfig):
    """A run's config.yaml as the typed config; keys that a later version added take their defaults."""
    try:
        return typed(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)))
    except (OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path} is no config of this program: {one_line(error)}") from None


def save(cfg, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)), encoding="utf-8")


def one_line(error: BaseException) -> str:
    """A library's error message without the lines meant for its developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Error merging override ") and error.__cause__ is not None:
        detail = str(error.__cause__).splitlines()[0]
        return f"{lines[0].removeprefix('Error merging override ')}: {detail[0].lower()}{detail[1:]}"
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    return f"{key}: {lines[0]}" if key else (lines[0] if lines else type(error).__name__)


def groups() -> dict[str, list[str]]:
    """Config groups and their options: {'model': ['deit_base', ...], ...}."""
    found = {}
    for file in CONFIGS.glob("*/*.yaml"):
        if file.parent.name == TABLE:
            continue
        found.setdefault(file.parent.name, []).append(file.stem)
    return found


def valid_keys(config_name: str) -> list[str]:
    keys = flatten(dataclasses.asdict(SCHEMAS[config_name]()))
    if config_name == "eval":
        keys |= flatten({"data": dataclasses.asdict(TrainConfig().data)})
    return sorted([*keys, "task.args", "model.args", "optim.args"] if config_name == "train" else keys)


def explain(error: BaseException, overrides: list[str], config_name: str) -> str:
    """One line for a composition that failed: the override at fault and the nearest thing that exists."""
    keys, options = valid_keys(config_name), groups()
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            return f"cannot read '{text}'; overrides look like key=value or group=name (quote special characters)"
        key = override.key_or_group
        if key == TABLE:
            return f"a table is many runs: python scripts/reproduce.py run {text} scale=smoke"
        if key in options:
            sweep = override.is_sweep_override()
            for value in override.sweep_string_iterator() if sweep else [override.get_value_element_as_str()]:
                if value not in options[key] and not (value == "null" and key in OPTIONAL[config_name]):
                    return f"{key}={value} does not exist{nearest(value, options[key])}"
        elif key.startswith(("hydra.", "hydra/")) or any(k.startswith(key + ".") for k in keys):
            continue
        elif key not in keys and not key.startswith(("task.args.", "model.args.", "optim.args.")):
            return f"{key} is no key of the config; {nearest_key(key, keys, options)}"
        elif config_name == "eval" and key.startswith("data."):
            return f"{key} needs data=<set>; root=<directory> says where the run's own data lies now"
    return one_line(error)


def nearest_key(key: str, keys: list[str], options: dict[str, list[str]]) -> str:
    candidates = keys + list(options)
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.55)
    if not close:  # 'lr' for 'optim.lr': compare with the last part
        tails = {k.rsplit(".", 1)[-1]: k for k in candidates}
        close = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f"did you mean {close[0]}?" if close else "python train.py --cfg job prints all keys"


def say_error(error: RunError) -> None:
    """Once per job: by the first process, or by the only one that knows."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or error.one_process:
        prefix = "" if isinstance(error, Interrupted) else "error: "
        where = f"process {rank}: " if error.one_process else ""
        print(f"{prefix}{where}{error}", file=sys.stderr, flush=True)
    else:  # torchrun stops all processes when one ends: let the first one speak before
        time.sleep(5)


def launch(config_name: str, task: Callable) -> None:
    """Runs `task(typed config)` under Hydra and exits with its code. In a multirun (-m) a job that fails leaves
    the others going; the exit code is then the largest, or with a launcher of other processes the first of them."""
    register_schemas()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # hand exceptions to us instead of printing and exiting
    codes, begun, stopped, home = [0], [], [], os.getpid()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def job(cfg: DictConfig) -> None:
        begun.append(True)
        if stopped:  # a multirun ends with the job that was interrupted
            return
        failure = None
        try:
            task(typed(cfg))
        except Interrupted as error:
            failure = error
            stopped.append(error)
        except RunError as error:
            failure = error
            say_error(error)
            codes.append(error.exit_code)
        except Exception as error:
            failure = RunError(f"{type(error).__name__}: {one_line(error)}")
            traceback.print_exc()
            codes.append(1)
        if failure and os.getpid() != home:  # under joblib and submitit only an exception finds its way home
            returned = RunError(str(failure))  # of a class that survives pickling
            returned.exit_code = failure.exit_code
            raise returned

    try:
        job()
    except KeyboardInterrupt:  # before or after training, where nothing is to be saved
        sys.exit(128 + signal.SIGINT)
    except RunError as error:  # from a worker, whose own words may lie in a file
        say_error(error)
        sys.exit(error.exit_code)
    except Exception as error:
        arguments = get_args_parser().parse_known_args()[0]
        if not isinstance(error, (HydraException, OmegaConfBaseException)):
            if begun:
                raise
            if arguments.multirun:
                say_error(RunError(f"a job was lost ({one_line(error)}); the same command goes on with the rest"))
                sys.exit(RunError.exit_code)
        say_error(ConfigError(explain(error, arguments.overrides, config_name)))
        sys.exit(ConfigError.exit_code)
    if stopped:
        say_error(stopped[0])
        sys.exit(stopped[0].exit_code)
    sys.exit(max(codes))
