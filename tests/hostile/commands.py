"""Commands generated from the schema and from the arguments of each command."""

import dataclasses
import importlib
import typing
from collections.abc import Iterator

from dropkey.config import schema
from dropkey.config.schema import EvalConfig, TrainConfig
from hostile.judge import Case

DIGITS = "9" * 5000
LONG = "a" * 5000
INTERPOLATIONS = ("${nope}", "${oc.env:NOPE}", "${trainer.nope}", "${nope:1}", "${", "${oc.decode:'['}", "${now:x}")
NUMBERS = (  # value, whether no number key can take it
    *(("abc", True), ("''", True), ("", True), ("[1,2]", True), ("{a:1}", True), ("ünï²", True), ("0", False)),
    *((".inf", True), ("-.inf", True), (".nan", True), ("1e300", True), (DIGITS, True), ("-1", True)),
)
BOOLS = (("abc", True), ("''", True), ("maybe", True), ("[true]", True), (".nan", True))
TEXTS = (
    *(("[a,b]", True), ("{a:1}", True), ("''", False), ("", False), ("'a\0b'", False), ("ünï-日本", False)),
    *((LONG, False), ("..", False), ("/proc/self/nope", False), ("'[/red]'", False), (".nan", False)),
)
LISTS = (
    *(("abc", True), ("5", True), ("{a:1}", True), ("[[1]]", True), ("[{a:1}]", True), ("[abc]", False), ("[]", False)),
    *(("''", True), (".nan", True), ("[.inf]", False), ("[.nan]", False), ("[-1e300]", False), (f"[{DIGITS}]", False)),
)
DICTS = (
    *(("5", True), ("abc", True), ("[1]", True), ("''", True), (".nan", True), ("{a:.nan}", False), ("{'':1}", False)),
    *(("{ünï:{a:[1]}}", False), ("{nope:1}", False)),
)
SIGNED = ("data.mean",)
OPEN = (  # texts that only the training itself can judge
    *("task.name", "task.args", "model.name", "model.args", "optim.name", "optim.args", "optim.lr_scale", "data.name"),
    *("augment.rand_augment", "init_from", "output", "data.root", "logger.project", "logger.tags", "logger.entity"),
)
TINY = ("model.depth=2", "model.embed_dim=32", "model.num_heads=2", "data.max_train_samples=48", "logger=none")
ONE_STEP = (*TINY, "data.test_fraction=0.05", "trainer.batch_size=16", "trainer.max_steps=1")


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(key, type) of each key of a config."""
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = types[field.name]
        nested = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        if nested:
            yield from keys_of(nested[0], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def values_of(hint) -> tuple[tuple[str, bool], ...]:
    kinds = set(typing.get_args(hint)) - {type(None)} if typing.get_origin(hint) is typing.Union else {hint}
    origin = typing.get_origin(next(iter(kinds)))
    if len(kinds) > 1 or kinds == {typing.Any}:  # regularizer.window, data.split_seed: numbers or a word
        return NUMBERS
    if origin is list:
        return LISTS
    if origin is dict:
        return DICTS
    return {int: NUMBERS, float: NUMBERS, bool: BOOLS, str: TEXTS}[kinds.pop()]


def may_be_null(hint) -> bool:
    return hint is typing.Any or type(None) in typing.get_args(hint)


def near_misses(key: str) -> tuple[str, ...]:
    """A letter lost, a letter doubled, two letters exchanged, another case."""
    head, dot, tail = key.rpartition(".")
    wrong = (tail[:-1], tail + tail[-1], tail[:-2] + tail[:-3:-1], tail.upper())
    return tuple(dict.fromkeys(head + dot + word for word in wrong if word and word != tail))


def train_cases() -> Iterator[Case]:
    chosen = {key: rule for rule, keys in CHOICES.items() for key in keys}
    for key, hint in keys_of(TrainConfig):
        real = key in OPEN
        base = ONE_STEP if real else ()
        for value, refused in values_of(hint):
            refused = refused and not (value == "-1" and key in SIGNED)
            refused |= key in chosen and value.strip("'") not in chosen[key]
            named = key.removesuffix(".args")  # model.name=... with {...}
            yield Case("train: values", "train", (*base, f"{key}={value}"), named, refused, real)
        if not may_be_null(hint):
            yield Case("train: values", "train", (f"{key}=null",), key, True)
        for value in INTERPOLATIONS[: 7 if key in ("output", "seed", "data.root", "optim.lr", "init_from") else 2]:
            refused = value != "${now:x}" or values_of(hint) is not TEXTS
            yield Case("train: interpolations", "train", (f"{key}={value}",), key, refused)
        for plus, wrong in zip(("", "+"), near_misses(key), strict=False):
            yield Case("train: unknown keys", "train", (f"{plus}{wrong}=1",), wrong, True)
    yield from map(pair, PAIRS)
    for words in BROKEN:
        yield Case("train: words", "train", words, "", True)
    for value in ARGS:
        key = value.partition("=")[0]
        key = key.rpartition(".")[2] if ".args." in key else key if "=0.999" not in value else "data."
        yield Case("train: arguments", "train", (*ONE_STEP, value), key, True, True)


CHOICES = {  # the words that some keys can have
    schema.REGULARIZER_NAMES: ("regularizer.name",),
    schema.IMPLS: ("regularizer.impl",),
    schema.SCHEDULES: ("schedule.name",),
    schema.OVER: ("schedule.over",),
    schema.AMP: ("trainer.amp",),
    schema.DEVICES: ("trainer.device", "eval.device"),
    ("wandb", "none"): ("logger.name",),
    ("offline", "online", "null"): ("logger.mode",),
    schema.SPLITS: ("eval.split",),
    ("last", "best"): ("eval.weights",),
}
PAIRS = (  # words, and the key that the refusal names
    ("regularizer=dropkey_block regularizer.window=9 data.image_size=8 model.patch_size=2", "regularizer.window"),
    ("regularizer=dropkey_block regularizer.window=99", "regularizer.window"),
    ("regularizer=dropkey_cross regularizer.window=17", "regularizer.window"),
    (f"regularizer=dropkey_cross regularizer.window={DIGITS}", "regularizer.window"),
    ("regularizer=dropkey_block regularizer.window=.nan", "regularizer.window"),
    ("regularizer=dropkey_block regularizer.window=true", "regularizer.window"),
    ("regularizer=dropkey_block regularizer.window=null", "regularizer.window"),
    ("regularizer=dropkey_block data=cifar10 model=volo_d1 regularizer.window=17", "regularizer.window"),
    ("regularizer=dropkey regularizer.window=3", "regularizer.window"),
    ("schedule.end=0.5 regularizer.ratio=0.1", "schedule.end"),
    ("optim.warmup_epochs=.inf trainer.epochs=1000", "optim.warmup_epochs"),
    ("optim.warmup_epochs=50", "optim.warmup_epochs"),
    ("optim.warmup_epochs=1e999", "optim.warmup_epochs"),
    ("trainer.batch_size=10 trainer.grad_accum_steps=3", "trainer.batch_size"),
    ("trainer.batch_size=1 trainer.grad_accum_steps=2", "trainer.batch_size"),
    ("model.embed_dim=33 model.num_heads=2", "model.embed_dim"),
    ("model.num_heads=128 model.embed_dim=64", "model.num_heads"),
    ("model.patch_size=3", "model.patch_size"),
    ("model.patch_size=16", "data.image_size"),
    ("data.image_size=7", "data.image_size"),
    ("data.image_size=1", "data.image_size"),
    ("model=t2t_vit_14", "data.image_size"),
    ("model=volo_d1 data.image_size=32 model.patch_size=5", "model.patch_size"),
    ("model.name=resnet18", "model.name"),
    ("data.mean=[0,0] data.channels=1", "data.mean"),
    ("data.mean=[]", "data.mean"),
    ("data.std=[]", "data.std"),
    ("data.std=[.inf]", "data.std"),
    ("data.mean=[.nan]", "data.mean"),
    ("data.mean=[1e300]", "data.mean"),
    ("data.channels=2", "data.channels"),
    ("data.crop_pct=0.9", "data.crop_pct"),
    ("data.split_seed=-1", "data.split_seed"),
    ("data.split_seed=true", "data.split_seed"),
    ("data.split_seed=runn", "data.split_seed"),
    ("augment.crop_scale=[0.5]", "augment.crop_scale"),
    ("augment.crop_scale=[1,0.5]", "augment.crop_scale"),
    ("augment.crop_scale=[.nan,1]", "augment.crop_scale"),
    ("augment.crop_scale=[.nan,.nan]", "augment.crop_scale"),
    ("augment.crop_scale=[0.5,.inf]", "augment.crop_scale"),
    ("augment.crop_padding=8", "augment.crop_padding"),
    ("optim.lr_scale.head=-1", "optim.lr_scale.head"),
    ("optim.lr_scale.head=.inf", "optim.lr_scale.head"),
    ("optim.lr_scale.head=abc", "optim.lr_scale.head"),
    ("optim.lr_scale.head=1e300", "optim.lr_scale.head"),
    ("optim.lr_scale.head=true", "optim.lr_scale.head"),
    ("model.pretrained=true init_from=.", "init_from"),
    ("init_from=", "init_from"),
    ("init_from=''", "init_from"),
    ("init_from=,", "init_from"),
    ("init_from=*", "init_from"),
    ("init_from=/", "init_from"),
    ("init_from=/etc/passwd/x", "init_from"),
    ("data.root=", "data.root"),
    ("data=folder data.root=", "data.root"),
    ("output=", "output"),
    ("output=''", "output"),
    ("trainer.device=cuda:0", "trainer.device"),
    ("trainer.device=cuda", "trainer.device"),
    ("data.num_workers=5000 data.in_memory=false", "data.num_workers"),
    ("seed=0.5", "seed"),
    ("seed=-0.0", "seed"),
    ("seed=99999999999999999999", "seed"),
    ("regularizer.layers=[]", "regularizer.layers"),
    ("regularizer.layers=[self,self]", "regularizer.layers"),
    ("regularizer.layers=[outlook] regularizer.ratio=2", "regularizer.ratio"),
)
BROKEN = (
    *(("=",), ("=1",), ("key value",), ("seed",), ("seed=[",), ("seed={",), ("seed='",), ('seed="',), ("+",), ("~",)),
    *(("++",), ("seed=0,1",), ("seed=range(3)",), ("optim.lr=choice(1,2)",), ("~model.depth",), ("@",)),
    *(("~nope",), ("+seed=1",), ("seed.x=1",), ("model.depth.x=1",), ("optim.lr.x.y=1",), ("model=",), ("model=null",)),
    *(("data=null",), ("model=/etc/passwd",), ("model=../../nope",), ("0",)),
    *(("experiment=nope",), ("debug=nope",), ("local=nope",), ("hydra.run.dir=${nope}",), ("hydra.job.chdir=abc",)),
    *(("hydra/launcher=nope",), ("hydra.nope=1",), ("--nope",), ("--config-name", "nope"), ("--config-dir", "/nope")),
    *(("--cfg", "nope"), ("-c",), ("table=schedule",), ("data@x=digits",), ("\udcff=1",)),
    *(("optim.lr=\udcff",), ("regularizer.ratio=0.1 0.2",), ("trainer=default optim",), ("seed=\n1",), ("a.b.c.d=1",)),
    *(("-m", "seed=${nope},1"), ("-m", "regularizer.ratio=2"), ("-m", "seed=range(0,1,0)"), ("-m", "seed=")),
)
ARGS = (
    *("model.args.act_layer=nope", "model.args.norm_layer=nope", "model.args.nope=1", "model.args.drop_rate=2"),
    *("model.args.init_values=abc", "model.args.global_pool=nope", "model.args.depth=-1"),
    *("model.args.img_size=[1,2]", "model.args.num_classes=5", "model.args.embed_layer=nope", "model.args.block_fn=5"),
    *("model.args.weight_init=nope", "model.args.pos_embed=nope", "model.args.reg_tokens=-5", "model.args.depth=abc"),
    *("model.args.mlp_layer=nope", "model.args.patch_size=0", "model.args.num_heads=0", "model.args.in_chans=abc"),
    *("model.args.pretrained_cfg=nope", "model.args.features_only=true"),
    *("model.args.checkpoint_path=/nope", "model.args.embed_dim=0", "model.args.mlp_ratio=-1", "model.args.''=1"),
    *("optim.args.betas=abc", "optim.args.betas=[2,2]", "optim.args.nope=1", "optim.args.eps=-1", "optim.args.lr=1"),
    *("optim.args.betas=[0.9]", "optim.args.opt=sgd", "optim.args.eps=abc"),
    *("task.args.nope=1", "optim.lr_scale.nope=1", "task.name=nope", "task.name=os:nope", "task.name=nope:X"),
    *("task.name=os:getcwd", "task.name=:", "optim.name=nope", "augment.rand_augment=nope", "augment.rand_augment=''"),
    *("data.name=nope", "data.name=os:nope", "data.name=nope:x", "data.name=os:getcwd", "data.name=:"),
    *("data.num_classes=7", "data.test_fraction=0.999", "data.val_fraction=0.999"),
)


def pair(words_and_key: tuple[str, str]) -> Case:
    words, key = words_and_key
    return Case("train: pairs", "train", tuple(words.split(" ")), key, True)


def eval_cases(run: str) -> Iterator[Case]:
    chosen = {key: rule for rule, keys in CHOICES.items() for key in keys}
    for key, hint in keys_of(EvalConfig):
        base = (f"run={run}",) if key not in ("run", "checkpoint") else ()
        base += ("data=digits",) if key.startswith("data.") else ()
        for value, refused in values_of(hint):
            refused = refused and not (value == "-1" and key in SIGNED)
            refused |= (key in chosen and value.strip("'") not in chosen[key]) or key in ("run", "checkpoint")
            yield Case("eval", "eval", (*base, f"{key}={value}"), key, refused)
        yield Case("eval", "eval", (*base, f"{key}={INTERPOLATIONS[0]}"), key, True)
        for wrong in near_misses(key)[1:2]:
            yield Case("eval", "eval", (*base, f"{wrong}=1"), wrong, True)
    pairs = (
        "",
        "run=nope",
        "checkpoint=nope",
        f"run={run} checkpoint=x",
        f"run={run} data=nope",
        "run=",
        "checkpoint=",
    )
    for words in (*pairs, "run=.", "run=/", f"checkpoint={run}", "run=*", f"run={run} eval.nope=1", f"run={run},{run}"):
        yield Case("eval", "eval", tuple(words.split()), "", True)


def argument_cases(family: str, command: str, base: tuple[str, ...]) -> Iterator[Case]:
    """Each argument of a script with each value that its type does not have, and with its name misspelt."""
    args = importlib.import_module(f"dropkey.commands.{command}").Args
    for field in dataclasses.fields(args):
        key, hint = field.name, typing.get_type_hints(args)[field.name]
        if key == "action":
            continue
        words = tuple(word for word in base if not word.startswith(f"{key}="))
        for value, refused in values_of(hint):
            refused = refused and values_of(hint) in (NUMBERS, BOOLS) and value != "-1"
            refused |= bool(field.metadata["choices"]) and value not in field.metadata["choices"]
            refused &= not (value in ("", "1e300", DIGITS) and hint is not int)
            named = "" if key in ("sort", "delta") else key  # the message names the value, or what else is missing
            if "\0" not in value:  # no shell passes it on
                yield Case(family, command, (*words, f"{key}={value}"), named, refused)
        for wrong in {*near_misses(key)[1:2]} - {one.name for one in dataclasses.fields(args)}:
            yield Case(family, command, (*base, f"{wrong}=1"), wrong, True)


def script_cases(run: str, image: str, table: str) -> Iterator[Case]:
    yield from argument_cases("runs", "runs", ("list",))
    for word in (
        "seed=.nan",
        "seed=",
        f"seed={DIGITS}",
        "nope=1",
        "state=nope",
        "regularizer=[",
        "=",
        "optim.lr=1e999",
    ):
        yield Case("runs", "runs", (word,))
    for words in (("nope",), ("list", "nope"), ("diff", f"run={run}"), ("sort=nope",)):
        yield Case("runs", "runs", words, "", True)
    yield from argument_cases("visualize", "visualize", ("maps", f"run={run}"))
    for key in ("grid", "ratio"):
        for value, refused in NUMBERS:
            yield Case("visualize", "visualize", ("masks", f"{key}={value}", "output=m.png"), key, refused)
    yield from argument_cases("reproduce plan", "reproduce", ("plan", f"table={table}", "scale=tiny"))
    plan = ("plan", f"table={table}", "scale=tiny")
    for word in ("trainer.epochs=abc", "optim.lr=.inf", "seed=1", "nope=1", "output=${nope}", "model.depht=1", "x"):
        yield Case("reproduce plan", "reproduce", (*plan, word), "", True)
    yield from argument_cases("predict", "predict", (f"run={run}", image))
    for words in ((), (image,), (f"run={run}",), (f"run={run}", "nope.png"), (f"run={run}", "*.nope"), ("run=", image)):
        yield Case("predict", "predict", words, "", True)
    yield from argument_cases("export", "export", (f"run={run}", "overwrite=true"))


SEARCHES = (  # words, and what the refusal names
    *(("", "search"), ("optim.lr", "optim.lr"), ("optim.lr=0.1", "search"), ("optim.lr=log:0..1", "optim.lr")),
    *(("optim.lr=log:-1..1", "optim.lr"), ("optim.lr=1..0.5", "optim.lr"), ("optim.lr=1e-3..inf", "optim.lr")),
    *(("optim.lr=1e-3..1e999", "optim.lr"), ("optim.lr=0.1..", "optim.lr"), ("optim.lr=log:a,b", "optim.lr")),
    *(("regularizer.ratio=0..2", "regularizer.ratio"), ("nope=1..2", "nope"), ("regularizer=none,nope", "nope")),
    *(("optim.lr=0.1,0.2 trials=", "trials"), ("optim.lr=0.1,0.2 trials=²", "trials"), ("trials=x", "trials")),
    *(("optim.lr=0.1,0.2 trials=-1", "trials"), (f"optim.lr=0.1,0.2 trials={DIGITS}", "trials")),
    *(("optim.lr=0.1,0.2 trials=0", "trials"), ("optim.lr=0.1,0.2 trials=1.5", "trials")),
    *(("optim.lr=0.1,0.2 seed=a,b", "seed"), ("optim.lr=0.1,0.2 seed=", "seed"), ("optim.lr=0.1,0.2 seed=-1", "seed")),
    *((f"optim.lr=1..{DIGITS}", "optim.lr"), ("optim.lr=0.1,0.2 output=/proc/nope", "output"), ("trials", "trials")),
    *(("optim.lr=0.1,0.2 overwrite=true", "overwrite"), ("optim.lr=0.1,0.2 data.val_fraction=0", "data.val_fraction")),
    *(("model.depth=1.5..2.5", "model.depth"), ("model.depth=log:0..2", "model.depth"), ("seed=0..3", "seed")),
    *(("optim.lr=${nope},1", "optim.lr"), ("optim.lr=0.1,0.2 output=${nope}", "output"), ("optim.lr=a..b", "optim.lr")),
    *(
        ("model.depth=2,4 optim.lr=[1,2]", "optim.lr"),
        ("optim.lr=0.1,abc", "optim.lr"),
        ("=1..2", "=1..2"),
        ("~optim", ""),
    ),
)


def all_cases(run: str, image: str, table: str) -> list[Case]:
    searches = [Case("search", "search", tuple(words.split()), key, True) for words, key in SEARCHES]
    return [*train_cases(), *eval_cases(run), *searches, *script_cases(run, image, table)]
