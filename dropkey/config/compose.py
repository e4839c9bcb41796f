"""From configs, overrides and saved files to the typed config; what Hydra refuses becomes one line (ConfigError)."""

import contextlib
import dataclasses
import difflib
import itertools
import re
import sys
from pathlib import Path

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dropkey.config import help
from dropkey.config.check import nearest
from dropkey.config.schema import DataConfig, EvalConfig, TrainConfig, flatten
from dropkey.errors import ConfigError
from dropkey.invocation import invocation

PACKAGE = Path(__file__).parents[1]
INSTALLED = (PACKAGE / "configs").exists()  # they travel in the wheel; in a checkout they are beside the package
CONFIGS = (PACKAGE if INSTALLED else PACKAGE.parent) / "configs"
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig}
FREE = ("task.args", "model.args", "optim.args", "optim.lr_scale")  # keys that the schema does not know
TOO_LONG = re.compile(r"\d{4301}")  # for Python's int
REFUSALS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, AssertionError)  # of a composition


def register_schemas() -> None:
    """Makes the schemas known to Hydra; `${groups:<name>,...}`, `${keys:<schema>}` and `${invocation:<command>}` to the
    help texts."""
    for name, schema in SCHEMAS.items():
        node = OmegaConf.structured(schema)
        if schema is TrainConfig:  # so that model.args.qk_norm=true needs no +
            for key in FREE:
                OmegaConf.set_struct(OmegaConf.select(node, key), False)
        ConfigStore.instance().store(name=f"{name}_schema", node=node)
    OmegaConf.register_new_resolver("groups", groups, replace=True)
    OmegaConf.register_new_resolver("keys", lambda name, _root_: help.keys(SCHEMAS[name], _root_), replace=True)
    OmegaConf.register_new_resolver("invocation", invocation, replace=True)


def groups(*names: str) -> str:
    """Each group and its options, for --help."""
    return help.two_columns(((name, ", ".join(options(name))) for name in names), left=12)


def options(group: str) -> list[str]:
    """Names of a group's files on Hydra's whole search path; Hydra must have started."""
    return GlobalHydra.instance().config_loader().get_group_options(group)


def typed(cfg: DictConfig) -> TrainConfig | EvalConfig:
    """The dataclass behind a composed config; raises ConfigError for keys and values that the schema does not have."""
    schema = OmegaConf.get_type(cfg)
    keys = valid_keys(schema)
    for key in flatten(OmegaConf.to_container(cfg)):
        if (
            key not in keys and key not in FREE and not key.startswith(tuple(f"{free}." for free in FREE))
        ):  # +key=value adds it
            raise ConfigError(unknown(key, schema))
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, schema)) from None


def compose(overrides: list[str] = (), config_name: str = "train") -> TrainConfig | EvalConfig:
    """The config that `dropkey train <overrides>` would run, unchecked. For scripts, notebooks and tests."""
    register_schemas()
    started = GlobalHydra.instance().is_initialized()  # within a @hydra.main function
    with contextlib.nullcontext() if started else hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            return typed(hydra.compose(config_name, list(overrides)))
        except REFUSALS as error:
            raise ConfigError(explain(error, SCHEMAS[config_name])) from None


def load(path: Path, schema: type = TrainConfig) -> TrainConfig | EvalConfig:
    """A run's config.yaml as the typed config; keys that a later version added take their defaults."""
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree) or not tree:
            raise ValueError("it has no keys")
        return typed(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except (*REFUSALS, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not a config of this program: {explain(error, schema)}") from None


def read(path: Path) -> TrainConfig:
    """The same in a fortieth of the time, for lists of many runs: nothing is checked.

    Raises:
        ConfigError: no YAML file with a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return filled(TrainConfig, tree)
    except (OSError, yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a config of this program: {str(error).splitlines()[0]}") from None


def filled(schema: type, tree: dict):
    """An instance of a nested dataclass; keys that it does not have are left out, those that are missing take their
    defaults."""
    known = {field.name: field for field in dataclasses.fields(schema) if field.name in tree}
    return schema(
        **{
            name: filled(field.type, tree[name]) if dataclasses.is_dataclass(field.type) else tree[name]
            for name, field in known.items()
        }
    )


def save(cfg: TrainConfig, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ errors


def valid_keys(schema: type) -> list[str]:
    keys = flatten(dataclasses.asdict(schema()))
    if schema is EvalConfig:
        keys |= flatten({"data": dataclasses.asdict(DataConfig())})
    return list(keys)


def explain(error: BaseException, schema: type) -> str:
    """One line for what Hydra or OmegaConf refused: the key or option at fault, and the nearest one that exists."""
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}'; overrides are key=value or group=option (quote special characters)"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} does not exist{nearest(option, error.options)}"
    if "Unexpected type for root" in str(error):  # a key below one that is null
        return "data.<key>=... needs data=<set>; root=<directory> says where the run's own data is now"
    if "integer string conversion" in str(error):  # Python's limit, met by Hydra, which does not say in which word
        return f"{next((word for word in sys.argv if TOO_LONG.search(word)), 'a value')} has too many digits"
    if several := re.search(r"Ambiguous value for argument '(.+?)=(.*?)'", str(error)):
        key, value = several.groups()
        as_list = f"write '{key}=[{value}]' for a list, or " if "." in key else ""
        return f"{key}={value} has several values; {as_list}add --multirun for several runs"
    text = f"{error}\n{error.__cause__ or ''}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    file = re.match(r"In '(.+?)':", text)
    where = f" (in {file.group(1)})" if file else ""
    key = re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '(.+?)'", text)
    if key is None:
        return " ".join(lines) or type(error).__name__
    if re.search(r"Key '.+' not in|Could not override", text):
        return unknown(key.group(1), schema, where)
    detail = next(before for before, line in itertools.pairwise(lines) if line.startswith("full_key:"))
    return f"{key.group(1)}: {detail}{where}"


def unknown(key: str, schema: type, where: str = "") -> str:
    """The message for a key that the schema does not have."""
    if key == "table":
        return f"a table is many runs: {invocation('reproduce')} run table=<name> scale=smoke"
    if key.startswith("hydra."):
        return f"{key} is no key of Hydra{where}; --cfg hydra prints all keys"
    keys = valid_keys(schema)
    keys = dict.fromkeys([*keys, *FREE, *(known.split(".")[0] for known in keys), "experiment", "debug"])
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.55)
    if not close:  # 'lr' for 'optim.lr': compare the last parts
        tails = {known.rsplit(".", 1)[-1]: known for known in keys}
        close = [tails[tail] for tail in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    hint = f"did you mean {close[0]}?" if close else "--cfg job prints all keys"
    return f"{key} is no key of the config{where}; {hint}"
