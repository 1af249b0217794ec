"""The whole configuration, one typed tree. Imports no torch: help, errors and `--dry-run` are instant.

A field marked [open] is a point that the Flash-DMD paper (arXiv 2511.20549) leaves unstated; its default and where it comes from are in
the docstring under it.

| file | keys |
|---|---|
| `joint.py` | `seed`, `steps`, `batch`, `ttur`, `runtime`; what must agree between sections |
| `run.py` | `run`, `checkpoint`, `tracking` |
| `networks.py` | `model`, `lora` |
| `data.py` | `data` |
| `algorithm.py` | `sampling`, `score`, `matching`, `adversarial`, `preference` |
| `optimizers.py` | `generator` and every other optimizer, `engine` |
| `rewards.py` | `rewards` |
| `monitor.py` | `monitor` |
| `runtime.py` | `placement`, `deadlines`, `control` |
| `evaluation.py` | `evaluation` |
"""

from __future__ import annotations

from flashdmd_ray.config.addresses import hide_passwords, tracking_address
from flashdmd_ray.config.algorithm import (
    AdversarialConfig,
    GeneratorConfig,
    MatchingConfig,
    PreferenceConfig,
    SamplingConfig,
    ScoreConfig,
)
from flashdmd_ray.config.data import DataConfig
from flashdmd_ray.config.evaluation import EvaluationConfig
from flashdmd_ray.config.joint import Config
from flashdmd_ray.config.loading import (
    PRESETS,
    dump_changes,
    dump_config,
    load_as,
    load_config,
    parse_config,
    validated,
)
from flashdmd_ray.config.monitor import MonitorConfig, MonitorLimits
from flashdmd_ray.config.networks import LoraConfig, ModelConfig
from flashdmd_ray.config.optimizers import EngineConfig, OptimizerConfig, RateConfig
from flashdmd_ray.config.overrides import apply_override
from flashdmd_ray.config.rewards import RemoteConfig, RewardConfig
from flashdmd_ray.config.run import CheckpointConfig, RunConfig, TrackingConfig
from flashdmd_ray.config.runtime import (
    ControlConfig,
    DeadlineConfig,
    GroupConfig,
    PlacementConfig,
    PoolConfig,
    RewardPoolConfig,
)
from flashdmd_ray.config.section import (
    Count,
    Fraction,
    LocalPath,
    MayChange,
    PathOrName,
    PositiveFloat,
    PositiveInt,
    PublicUrl,
    Section,
    Timestep,
    TrackingUrl,
    changeable_keys,
    local_path,
    suggestion,
)

__all__ = [
    "PRESETS",
    "AdversarialConfig",
    "CheckpointConfig",
    "Config",
    "ControlConfig",
    "Count",
    "DataConfig",
    "DeadlineConfig",
    "EngineConfig",
    "EvaluationConfig",
    "Fraction",
    "GeneratorConfig",
    "GroupConfig",
    "LocalPath",
    "LoraConfig",
    "MatchingConfig",
    "MayChange",
    "ModelConfig",
    "MonitorConfig",
    "MonitorLimits",
    "OptimizerConfig",
    "PathOrName",
    "PlacementConfig",
    "PoolConfig",
    "PositiveFloat",
    "PositiveInt",
    "PreferenceConfig",
    "PublicUrl",
    "RateConfig",
    "RemoteConfig",
    "RewardConfig",
    "RewardPoolConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "Section",
    "Timestep",
    "TrackingConfig",
    "TrackingUrl",
    "apply_override",
    "changeable_keys",
    "dump_changes",
    "dump_config",
    "hide_passwords",
    "load_as",
    "load_config",
    "local_path",
    "parse_config",
    "suggestion",
    "tracking_address",
    "validated",
]
