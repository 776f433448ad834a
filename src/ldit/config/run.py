"""RunConfig: what training adds to a model that makes pictures."""

from dataclasses import dataclass, field
from typing import Any

from ldit.config.base_run import RUN_FORMAT, BaseRun
from ldit.config.model import ClassModelConfig
from ldit.config.sections import EvalConfig, ObjectiveConfig
from ldit.config.serial import from_dict
from ldit.config.spec import (
    CodecConfig,
    DDPMConfig,
    FlowConfig,
    PixelCodecConfig,
    ProcessConfig,
    SamplingConfig,
    codec_from_dict,
    process_from_dict,
)
from ldit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunConfig(BaseRun):
    """One training run of a diffusion model, resolved. Saved as RUN/config.json."""

    model: ClassModelConfig
    process: ProcessConfig = field(default_factory=FlowConfig)
    codec: CodecConfig = field(default_factory=PixelCodecConfig)
    sampling: SamplingConfig | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def check(self) -> None:
        """ConfigError naming the key whose value cannot work, whatever the number of processes."""
        super().check()
        for key, least in (("every", 0), ("num", 2), ("batch_size", 1)):
            value = getattr(self.eval, key)
            if value < least:
                raise ConfigError(f"eval.{key}: must be at least {least}, got {value}")
        if self.model.cond_channels:
            raise ConfigError("model.cond_channels: training with extra input channels is not built yet")
        for key in ("n_heads", "n_kv_heads"):
            heads = getattr(self.model, key)
            if heads is not None and heads % self.parallel.tp:
                raise ConfigError(f"parallel.tp: {self.parallel.tp} does not divide model.{key} {heads}")
        if isinstance(self.process, DDPMConfig) and self.objective != ObjectiveConfig():
            raise ConfigError("objective: DDPM draws its times evenly; time_mean and time_std are flow's")
        side, factor = self.data.image_size, self.codec.factor
        if side % factor or side // factor != self.model.input_size:
            raise ConfigError(
                f"data.image_size: {side} pixels give latents of {side / factor:g}, "
                f"the model takes {self.model.input_size}"
            )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RunConfig":
        """Strict reader of RUN/config.json."""
        check_format(data)
        body = {key: value for key, value in data.items() if key not in ("format", "process", "codec")}
        config = from_dict(cls, body)
        return cls(
            **{
                **{name: getattr(config, name) for name in cls.__dataclass_fields__},
                "process": process_from_dict(data.get("process")),
                "codec": codec_from_dict(data.get("codec")),
            }
        )


def check_format(data: Any) -> None:
    """ConfigError when `data` is not the content of a RUN/config.json of a known format."""
    if not isinstance(data, dict) or data.get("format") != RUN_FORMAT:
        raise ConfigError(
            f"format: expected {RUN_FORMAT!r}, got {data.get('format') if isinstance(data, dict) else data!r}"
        )
