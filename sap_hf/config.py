"""SapConfig: the few dials of sap_hf, as a dataclass and as YAML with the same names."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from sap_hf.errors import ConfigError

STRATEGIES = ("auto", "sap", "all_gather", "ring", "ulysses")
LAYOUTS = ("auto", "contiguous", "zigzag", "balanced")
DELIVERIES = ("auto", "p2p", "all_to_all", "all_gather")
REMOTE_KV = ("refetch", "keep")
KERNELS = ("auto", "reference", "sdpa", "varlen", "flash", "flex")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SapConfig:
    """How packed rows are shared by ranks. Every field has a default that works.

    Raises:
        ConfigError: a value that a field cannot have; the nearest possible one is named.
    """

    cp_size: int | None = None
    """Ranks that share one pack. None: all ranks of the run. The others become data-parallel groups."""
    ulysses_size: int | str = "auto"
    """Neighbouring ranks of the cp group that exchange heads instead of rows, at most as many as there are query heads;
    groups of them share rows by `strategy`. auto: for each batch the degree with the least modelled time."""
    strategy: str = "auto"
    """auto | sap (move the rows that are read) | all_gather (move every row to every rank) | ring (every row too, one
    neighbour after the other) | ulysses (exchange heads alone: ulysses_size = cp_size)."""
    layout: str = "auto"
    """auto | contiguous | zigzag | balanced (even work, little moved): which rows each rank holds. auto takes the one
    with the least modelled time; contiguous, where layers mix neighbouring tokens outside attention."""
    delivery: str = "auto"
    """auto | p2p (one grouped message per run of rows) | all_to_all (one uneven collective per stage) | all_gather (the
    collective, for strategy all_gather)."""
    max_remote_rows: int | None = None
    """Rows of other ranks that a rank holds at once, at least 2: more arrive in stages, in turn. null: no limit."""
    remote_kv: str = "refetch"
    """refetch | keep: in the backward, receive remote K/V again (less memory) or keep it from the forward. Under
    gradient checkpointing keep is for exchanged heads: else the recompute exchanges them again."""
    kernel: str = "auto"
    """auto | reference | sdpa (CPU) | varlen (torch, CUDA) | flash (flash-attn, CUDA) | flex (FlexAttention, CUDA)."""
    hardware: str = "auto"
    """What the plans' modelled seconds are for: a preset of sap_hf.planning.hardware, or a file that `sap-hf bench
    --calibrate` wrote; auto is cpu on CPUs, else h100."""
    check_batches: bool = True
    """Compare a hash of the batch and its plan over the ranks that share it (24 bytes each, on the CPU): a Trainer's
    batches while the one before trains; an epoch's first and those of an evaluation before their forward."""
    profile: bool = False
    """Log bytes that attention moved, seconds that it waited and what its plans cost beside every loss of a Trainer;
    sap_hf/hf/profile.py says what each figure means."""

    def __post_init__(self) -> None:
        if self.cp_size is not None and (not isinstance(self.cp_size, int) or self.cp_size < 1):
            raise ConfigError(
                f"cp_size={self.cp_size!r} must be a positive number of ranks, or null for all ranks."
            )
        check_ulysses_size(self.ulysses_size)
        if self.strategy == "ulysses" and self.ulysses_size not in ("auto", self.cp_size):
            raise ConfigError(
                f"strategy='ulysses' exchanges heads among all cp_size={self.cp_size} ranks, not among ulysses_size="
                f"{self.ulysses_size}. Use ulysses_size='auto', or strategy='sap'."
            )
        for name in ("check_batches", "profile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be true or false.")
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("delivery", self.delivery, DELIVERIES)
        check_choice("remote_kv", self.remote_kv, REMOTE_KV)
        check_choice("kernel", self.kernel, KERNELS)
        check_delivery(self.strategy, self.delivery)
        check_remote_rows(self.max_remote_rows)
        if self.strategy == "ring" and self.remote_kv == "keep":
            raise ConfigError(
                "remote_kv='keep' holds all remote rows until the backward, strategy='ring' only two neighbours' at a "
                "time. Use remote_kv='refetch', or strategy='all_gather'."
            )
        if self.max_remote_rows is not None and self.remote_kv == "keep":
            raise ConfigError(
                "remote_kv='keep' holds all remote rows until the backward, which max_remote_rows="
                f"{self.max_remote_rows} forbids. Use remote_kv='refetch', or max_remote_rows=None."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "SapConfig") -> SapConfig:
        """Build a config from a mapping of field names.

        Raises:
            ConfigError: a key that is not a field; `origin` and the nearest field are named.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(f"{origin}: unknown key {key!r}.{nearest(key, names)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> SapConfig:
        """Read a YAML file whose keys are the field names.

        Raises:
            ConfigError: the file does not exist or is not a mapping, an unknown key, or a value a field cannot have.
        """
        import yaml

        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file. Pass the path of a YAML file with SapConfig fields.")
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: holds a {type(values).__name__}; a mapping of SapConfig fields is needed."
            )
        return cls.from_dict(values, origin=str(path))

    @classmethod
    def resolve(cls, config: SapConfig | str | Path | None, options: dict[str, Any]) -> SapConfig:
        """The config that `attach(trainer, config, **options)` means: options override the fields of config."""
        if config is None:
            base = cls()
        elif isinstance(config, cls):
            base = config
        elif isinstance(config, str | Path):
            base = cls.from_yaml(config)
        else:
            raise ConfigError(
                f"config is a {type(config).__name__}; pass a SapConfig, the path of its YAML file, or None."
            )
        fields = {field.name: getattr(base, field.name) for field in dataclasses.fields(cls)}
        return cls.from_dict({**fields, **options}, origin="options")


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value outside `choices`, naming the nearest one."""
    if value in choices:
        return
    raise ConfigError(f"{field}={value!r} is not one of {', '.join(choices)}.{nearest(str(value), choices)}")


def check_delivery(strategy: str, delivery: str) -> None:
    """Refuse the collective that moves every row for a strategy that moves fewer."""
    if delivery == "all_gather" and strategy not in ("auto", "all_gather"):
        raise ConfigError(
            f"delivery='all_gather' moves every row, strategy={strategy!r} only those that are read. "
            "Use strategy='all_gather', or delivery='auto'."
        )


def check_ulysses_size(size: object) -> None:
    """Refuse what is neither a number of ranks nor "auto"."""
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f'ulysses_size={size!r} must be a number of ranks from 1 on, or "auto".')


def check_remote_rows(limit: object) -> None:
    """Refuse a budget that does not hold one row while another travels."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 2):
        raise ConfigError(
            f"max_remote_rows={limit!r} must be a number of rows from 2 on, or null for no limit."
        )


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """' Did you mean ...?' for the nearest known word, or '' when none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
