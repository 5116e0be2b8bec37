"""`tokenflow predict`: a LightningCLI that knows one subcommand and all installed plugins."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from typing import Any, NoReturn, get_args, get_type_hints

import torch.distributed as dist
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import utils as hub_utils
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from transformers.utils import logging as transformers_logging

from tokenflow.cli.allowlist import require_local, restrict
from tokenflow.cli.choices import Choices
from tokenflow.cli.configurations import configs_first, split_allowed
from tokenflow.cli.corrections import corrected
from tokenflow.cli.inputs import NAMED, make_absolute, paths_of, require_readable
from tokenflow.cli.options import CLASSES, DEFAULTS, PLUGINS, meant
from tokenflow.cli.stop import stop
from tokenflow.diffusion.backbone import EMBEDDED
from tokenflow.engine.lightning.data import Video
from tokenflow.engine.lightning.job import Job, plugin_key
from tokenflow.engine.lightning.loggers import Logged
from tokenflow.engine.lightning.metrics import Measuring
from tokenflow.engine.lightning.module import TRAINER, TokenFlowModule
from tokenflow.engine.lightning.progress import StageProgress
from tokenflow.engine.lightning.run_writer import RunWriter, writer_of
from tokenflow.engine.ranks.group import FrameGroup
from tokenflow.engine.region import AUTO
from tokenflow.engine.settings import Settings
from tokenflow.errors import InputError, Interrupted, Preempted
from tokenflow.memory import explained_shortage
from tokenflow.miniature.scenes import VOCABULARY
from tokenflow.plugins import OPTION, require_usable
from tokenflow.private_names import dump_config, forks
from tokenflow.runs.files import finished
from tokenflow.storage.paths import local
from tokenflow.text import printable, printable_lines


class Parser(LightningArgumentParser):
    """Ends with one message, which names what is installed or the class whose option is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if unknown := re.search(r"does not accept option '(\w+)\.(\w+)", message):
            group, option = unknown.groups()
            if group in CLASSES:
                meant(group, option)
        lines = [corrected(self, message)]
        if "is not allowed, denied by" in message:
            lines.append(f"a configuration may not run code; if you trust it: {OPTION} PACKAGE")
        stop("\n".join([*lines, "see tokenflow predict --help"]))


class PredictCLI(LightningCLI):
    """Model, data, output and trainer from YAML files, environment and command line."""

    def __init__(self, *args: Any, allowed: Sequence[str] = (), **options: Any) -> None:
        self.allowed = list(allowed)
        super().__init__(*args, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "dataloaders", "datamodule"}
        return {"predict": skipped | {"return_predictions", "ckpt_path", "weights_only"}}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As Lightning's own, with the trainer's many options last."""
        parser.add_lightning_class_args(Video, "data")
        parser.add_lightning_class_args(TokenFlowModule, "model")
        parser.add_lightning_class_args(RunWriter, "output")
        parser.add_lightning_class_args(Measuring, "metrics")  # after what it measures
        parser.add_argument(
            "--run", type=dict | None, help="What a run.yaml records of its run; not an option."
        )
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"model.{name}": path for name, path in DEFAULTS.items()})
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER.items()})

    def before_instantiate_classes(self) -> None:
        for option, kind in (
            ("data", Video), ("model", TokenFlowModule), ("model", Settings), ("output", RunWriter)
        ):  # fmt: skip
            require_values(self.config.predict[option], kind, option)
        for option, group in PLUGINS.items():
            require_usable(self.config.predict.model[option].class_path, group)
        require_local(self.config.predict.trainer.as_dict())
        if self.config.predict.trainer.profiler == "xla":  # which fails once more at its end
            raise InputError(
                "the configuration cannot be used: --trainer.profiler xla is for TPUs; expected "
                "simple, advanced or pytorch"
            )

    def before_predict(self) -> None:
        if self.trainer.precision != "32-true":
            raise InputError(
                f"expected no --trainer.precision, got {self.trainer.precision}; the networks' "
                f"precision is --model.dtype"
            )
        if self.trainer.limit_predict_batches < 1:
            raise InputError(
                f"--trainer.limit_predict_batches {self.trainer.limit_predict_batches} would edit "
                f"nothing; leave it out"
            )
        strategy = self.trainer.strategy
        if forks(strategy.launcher) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                f"expected one device or --trainer.strategy ddp, got {type(strategy).__name__}"
                f"{', whose processes fork' if forks(strategy.launcher) else ''}"
            )
        choices = Choices(self.config_dump["model"])
        for job in self.datamodule.jobs:
            self.model.options(job)
            choices.settle(job)
            self.complete_inputs(job)
        self.require_readable()
        model = self.model.model
        if model not in EMBEDDED and not local(model).exists() and self.trainer.is_global_zero:
            print(f"fetching {printable(model)} from the hub, unless it is cached", file=sys.stderr)
        if model in EMBEDDED and self.trainer.is_global_zero:
            warn_of_unknown_words(
                text for job in self.datamodule.jobs for text in astuple(self.model.options(job)[0])
            )

    def complete_inputs(self, job: Job) -> None:
        """Lists the files that a job reads: its own, else those of the configuration."""
        if job.mask is None and self.config_dump["metrics"].get("mask"):
            job.mask = local(self.config_dump["metrics"]["mask"])
        if job.mask is not None:
            job.inputs["metrics.mask"] = job.mask
        model = self.config_dump["model"]
        edit_mask = job.edit_mask or model.get("mask")
        if edit_mask not in (None, AUTO):
            job.inputs["model.mask"] = local(edit_mask)
            # an edit that is local is measured outside of its region
            job.mask = job.mask or job.inputs["model.mask"]
        if depth := job.depth or model.get("depth"):
            job.inputs["model.depth"] = local(depth)
        for name in PLUGINS:
            own = job.plugins.get(name)
            spec = self.config_dump["model"][name] if own is None else own.spec
            for where, options, option in paths_of(f"model.{name}", spec):
                if option not in NAMED:
                    job.inputs[where] = local(options[option])

    def require_readable(self) -> None:
        """Opens the inputs of all jobs that are to be edited, before the model is loaded.

        Raises:
            InputError: The only clip's cannot be used. Of many clips, one that fails stops no
                other, and its reason is printed.
        """
        for job in self.datamodule.jobs:
            if job.where and finished(self.writer.folder / job.name) and not self.writer.overwrite:
                continue
            try:
                require_readable(job)
            except InputError as error:
                if job.where is None:
                    raise
                if self.trainer.is_global_zero:
                    said = f"{job.where} will fail: {error}"
                    print(printable_lines(said), file=sys.stderr)

    def predict(self, model: TokenFlowModule, datamodule: Video) -> None:
        """As the trainer's own, which would keep every clip's result until the last is done."""
        remedy = (
            "lower --data.resolution or --model.batch, or take --model.dtype float16 or bfloat16"
        )
        with explained_shortage(f"on {self.trainer.strategy.root_device} for the edit", remedy):
            self.trainer.predict(model, datamodule=datamodule, return_predictions=False)

    def after_predict(self) -> None:
        """Exit code 1, of the first process, where some of many clips failed."""
        if dist.is_initialized():
            # else gloo's threads, alive when the interpreter ends, may abort it
            self.model.group = self.model.everyone = FrameGroup()
            dist.destroy_process_group()
        if self.trainer.is_global_zero and self.writer.failed:
            raise SystemExit(1)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's own, for configurations that are no text."""
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            parser.error(f"expected a YAML file for --config, got one that is no text: {error}")

    def instantiate_classes(self) -> None:
        """As Lightning's own, for options that Lightning refuses or lacks a package for."""
        try:
            super().instantiate_classes()
        except (InputError, Interrupted, Preempted):
            raise
        except (MisconfigurationException, ValueError, ImportError) as error:
            raise InputError(f"the configuration cannot be used: {error}") from error
        except TypeError as error:
            if "'dict_kwargs'" not in str(self.config.as_dict()):
                raise
            raise InputError(
                f"the configuration cannot be used: {error}; dict_kwargs are for classes that take "
                f"any option: give those that a class has under init_args"
            ) from error
        except SystemExit as error:  # a plugin's, which would end a job as if it were done
            raise InputError(f"the configuration cannot be used: SystemExit: {error}") from error

    def after_instantiate_classes(self) -> None:
        dump_config(self).pop("run", None)
        self.config_dump["output"]["overwrite"] = False  # a repetition destroys nothing unasked
        typed = make_absolute(self.config_dump)
        self.writer = writer_of(self.trainer)
        self.writer.configuration, self.writer.allowed = self.config_dump, self.allowed
        self.writer.typed = typed
        options = self.config_dump["model"]
        self.model.plugin_keys = (
            plugin_key(self.model.editor, options["editor"]),
            plugin_key(self.model.propagation, options["propagation"]),
        )


def warn_of_unknown_words(prompts: Iterable[str]) -> None:
    """Warns once of words that the embedded model has never seen."""
    known = {"a", "on", *(word for words in VOCABULARY.values() for word in words)}
    unknown = dict.fromkeys(
        word
        for prompt in prompts
        for word in re.findall(r"\w+", prompt.lower())
        if word not in known
    )
    if unknown:
        warnings.warn(
            f"the embedded model does not know {', '.join(unknown)}: it knows the words of its "
            f"scenes alone, {' '.join(sorted(known))} (docs/miniature.md); for any others, choose "
            f"a model by --model.backbone",
            stacklevel=2,
        )


def require_values(given: Namespace, kind: type, group: str) -> None:
    """Raises `InputError` for an option that is left empty, which jsonargparse lets through."""
    hints = get_type_hints(vars(kind)["__init__"])
    for name, option in inspect.signature(kind).parameters.items():
        value = given.get(name, option)
        missing = value is None and type(None) not in get_args(hints.get(name))
        if missing or (value == "" != option.default):
            raise InputError(f"--{group}.{name} is empty; give it a value, or leave it out")


def quiet() -> None:
    """Leaves out what libraries say of harmless things."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    hub_utils.disable_progress_bars()  # type: ignore[attr-defined]
    hub_utils.logging.set_verbosity_error()  # else a line for every retry
    for harmless in (
        ".*isinstance.treespec, LeafSpec.*",
        ".*Couldn't infer the batch indices.*",
        ".*does not have many workers.*",
        ".*LightningCLI.s args parameter.*",
        ".*local_dir_use_symlinks.*",  # an option that diffusers gives the hub's client
        ".*predict returned None.*",  # a clip that other ranks edit
        ".*Total length of .DataLoader. across ranks is zero.*",  # Video.setup prints its own line
    ):
        warnings.filterwarnings("ignore", message=harmless)


def run(words: list[str], callbacks: Sequence[Callback] = ()) -> None:
    """Parses the words after `tokenflow predict` and edits, with `callbacks` besides its own."""
    words, allowed = split_allowed(words)
    words = configs_first(words)
    restrict(allowed)
    quiet()
    try:
        PredictCLI(
            TokenFlowModule,
            Video,
            args=["predict", *words],
            allowed=allowed,
            parser_class=Parser,
            parser_kwargs={"default_env": True, "env_prefix": "TOKENFLOW"},
            save_config_callback=None,
            seed_everything_default=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={"callbacks": [StageProgress(), Logged(), *callbacks]},
        )
    except Preempted as stopped:
        if dist.is_initialized():
            # ranks end one after the other, and gloo's threads may abort one that unwinds last
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(str(stopped.code)))
        raise
